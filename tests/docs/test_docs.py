"""The Python blocks of the pages in docs/ run as they stand, and so do the commands."""

import pydoc
import re
import shlex
from pathlib import Path

import pytest

import q4jax
from q4jax.cli import main as cli

DOCS = Path(__file__).parents[2] / "docs"
NEEDS_A_GPU = {"gpu"}
PAGES = {path.stem: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.M | re.S)


def run_blocks(page):
    blocks = python_blocks(page)
    namespace = {"__name__": "docs"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page}.md, Python block {number}", "exec"), namespace)
    return len(blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if python_blocks(p) and p not in {"checkpoints", *NEEDS_A_GPU}]
)
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the blocks leave their files
    run_blocks(page)


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    named = set(re.findall(r"^::: q4jax\.(\S+)$", text, re.M))
    public = {*q4jax.__all__, "checkpoint_v1"} - {"interop"}
    public |= {f"interop.{name}" for name in ("bitsandbytes", "huggingface", "peft")}
    # Beside "models", because the module of that name would hide the function there.
    assert named == public | {"models.generate.generate"}
    for name in public:
        assert pydoc.locate(f"q4jax.{name}").__doc__, name


@pytest.mark.slow
def test_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where the blocks leave their files
    text = PAGES["checkpoints"]
    assert run_blocks("checkpoints") > 8
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
