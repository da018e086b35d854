"""The Python blocks of the pages in docs/ run as they stand, and so do their commands."""

import pydoc
import re
import shlex
from pathlib import Path

import pytest

import q4jax
from q4jax.cli.main import DAMAGED, MISSING, UNSUPPORTED, main

DOCS = Path(__file__).parents[2] / "docs"
NEEDS_A_GPU = {"gpu"}
PAGES = {path.stem: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p not in NEEDS_A_GPU])
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where the blocks leave their files
    namespace = {"__name__": "docs"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page}.md, Python block {number}", "exec"), namespace)
    if page == "quantize":
        assert "head (Linear): kept: rule 'head' skips it" in capsys.readouterr().out
    commands = "".join(blocks(page, "sh")).splitlines() if page == "files" else []
    assert (len(commands) > 3) == (page == "files")
    for command in commands:
        python, option, module, *arguments = shlex.split(command)
        assert (python, option, module) == ("python", "-m", "q4jax")
        assert main(arguments) == 0, command


def test_every_exit_code_is_listed():
    codes = {int(code) for code in re.findall(r"^\| (\d) \|", PAGES["files"], re.M)}
    assert codes == {0, 2, DAMAGED, MISSING, UNSUPPORTED}


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: q4jax\.(\S+)$", text, re.M)
    public = {*q4jax.__all__, "checkpoint_v1"} - {"integrations", "interop"}
    public |= {f"interop.{name}" for name in ("bitsandbytes", "huggingface", "peft")}
    public |= {"integrations.tunix", "tree.lay_out.lay_out"}
    assert sorted(named) == sorted(public)
    for name in public:
        assert pydoc.locate(f"q4jax.{name}").__doc__, name


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.M))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= listed


def test_every_picture_of_the_results_is_shown():
    shown = "".join(PAGES.values())
    for path in (DOCS.parent / "benchmarks" / "results").glob("*.png"):
        assert f"](../benchmarks/results/{path.name})" in shown
