"""What a plan shows in a notebook."""

from html.parser import HTMLParser

from flax import nnx

import q4jax
from q4jax.convert.plan import Decision, Plan


class Cells(HTMLParser):
    """The texts of the cells of a table."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.found.append("")

    def handle_data(self, data):
        self.found[-1] += data


def test_a_plan_shows_a_row_for_each_layer():
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    plan = q4jax.plan_quantization(model)
    table = Cells(plan._repr_html_())
    assert table.found == ["path", "layer", "verdict", "layers.0", "Linear", "quantized"]
    assert str(plan) == "layers.0 (Linear): quantized"


def test_names_are_escaped():
    reason = "rule '<b>' & \"more\" skips it"
    table = Cells(Plan([Decision("a<script>", "X", False, reason)])._repr_html_())
    assert table.found[3:] == ["a<script>", "X", f"kept: {reason}"]
    assert set(table.tags) == {"table", "thead", "tbody", "tr", "th", "td"}


def test_a_memory_report_shows_what_it_prints():
    model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    report = q4jax.memory_report(model)
    shown = "".join(Cells(report._repr_html_()).found)
    for line in str(report).splitlines():
        assert "".join(line.split()) in "".join(shown.split())
