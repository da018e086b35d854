"""The README's Python blocks run as they stand, and its links and commands are there."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the blocks leave their files
    namespace = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS, start=1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)
    assert namespace["tree"].keys() == {"layer.weight"}


def test_the_first_block_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 12


def test_there_is_one_test_command():
    assert len(re.findall(r"^.*-m pytest.*$", TEXT, re.M)) == 1


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", TEXT):
        assert (README.parent / target).exists(), target
