"""The commands of the pages are complete: their options exist and have values that are allowed."""

import re
import shlex
from pathlib import Path

import pytest

from q4jax import finetune
from q4jax.cli.main import parser
from q4jax.cli.options import given_settings
from q4jax.finetune import mesh_text

DOCS = Path(__file__).parents[2] / "docs"


def commands(text):
    """Return the arguments of each `python -m q4jax` in the shell blocks of a page."""
    blocks = "".join(re.findall(r"^```(?:ba)?sh\n(.*?)^```$", text, re.M | re.S))
    for line in blocks.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        starts = [i for i in range(1, len(words)) if words[i - 1 : i + 1] == ["-m", "q4jax"]]
        yield from (tuple(words[start + 1 :]) for start in starts)


COMMANDS = {
    (path.stem, found) for path in DOCS.glob("*.md") for found in commands(path.read_text("utf-8"))
}


def test_pages_have_commands():
    assert {"recipes", "finetune", "files", "scaling", "sharding"} <= {page for page, _ in COMMANDS}
    words = {word for page, found in COMMANDS for word in found if page == "recipes"}
    assert {"finetune", "estimate", "generate", "chat", "merge", "convert"} <= words


@pytest.mark.parametrize(("page", "arguments"), sorted(COMMANDS))
def test_a_command_is_complete(page, arguments):
    options = parser().parse_args(arguments)
    if arguments[0] == "finetune":
        settings = finetune.Settings(**{"model": None, **given_settings(options)})
        assert options.resume or (settings.model and settings.data)
    if getattr(options, "mesh", None) is not None and arguments[0] == "estimate":
        assert mesh_text.sizes(options.mesh)


def test_a_wrong_command_is_found():
    [found] = commands("```bash\npython -m q4jax finetune --model m --lenght 3  # a slip\n```\n")
    with pytest.raises(SystemExit):
        parser().parse_args(found)


def test_the_reference_groups_every_name():
    text = (DOCS / "reference" / "finetune.md").read_text("utf-8")
    named = re.findall(r"`(\w+)`", text)
    assert sorted(named) == sorted(finetune.__all__)
    for name in finetune.__all__:
        assert getattr(finetune, name).__doc__, name
