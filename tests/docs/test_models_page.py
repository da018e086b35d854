"""The page of models names the families of the table."""

import re
from pathlib import Path

from q4jax.models.decoder.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_names_each_family_once():
    table = PAGE.read_text().partition("## Families")[2].partition("The directories")[0]
    named = re.findall(r"`(\w+)`", table.partition("|---|---|")[2])
    assert sorted(named) == sorted(FAMILIES)
    for page in ("index.md", "bitsandbytes.md"):
        assert f"[{len(FAMILIES)} families](models.md)" in (PAGE.parent / page).read_text()
