"""The Python blocks of the pages in docs/ run as they stand, and so do the commands."""

import re
import shlex
from pathlib import Path

import pytest

from q4jax import cli

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where the blocks leave their files
    text = (DOCS / "checkpoints.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) > 8
    namespace = {"__name__": "docs"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"checkpoints.md, Python block {number}", "exec"), namespace)
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    for command in commands.splitlines():
        python, option, module, *arguments = shlex.split(command)
        assert (python, option, module) == ("python", "-m", "q4jax")
        assert cli.main(arguments) == 0, command
    capsys.readouterr()
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", text, re.M)}
    assert codes == {0, 2, cli.DAMAGED, cli.MISSING, cli.UNSUPPORTED}


@pytest.mark.slow
def test_other_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "other-models.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) > 5
    namespace = {"__name__": "docs"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"other-models.md, Python block {number}", "exec"), namespace)
    assert "head (Linear): kept: rule 'head' skips it" in capsys.readouterr().out
