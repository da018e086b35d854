"""The notebooks run without an error, and what is stored is clean, complete and small."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A path of some machine, of Unix or Windows; "/" in text, and relative paths, are no such thing.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|usr|tmp|opt|work|var|Users|mnt)\b|[A-Z]:\\\\")


def cells(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def test_there_are_four_and_they_are_small():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    sizes = [path.stat().st_size for path in NOTEBOOKS]
    assert max(sizes) < 600_000
    assert sum(sizes) < 2_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_outputs(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    for output in outputs:
        assert output["output_type"] in ("display_data", "execute_result", "stream")
        assert output.get("name", "stdout") == "stdout", output  # a warning, for example
    text = json.dumps([{**output, "data": None} for output in outputs])
    assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)


FOLDERS = ["home", "root", "usr", "tmp", "opt", "work", "var", "Users", "mnt"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("context", ["{}", "in {}", '"{}"', "({})"])
def test_a_machine_path_is_seen(context, folder):
    assert MACHINE_PATH.search(context.format(f"/{folder}/x"))


def test_a_drive_is_seen():
    assert MACHINE_PATH.search("C:\\\\Users")


@pytest.mark.heavy
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs(path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for package in ("gguf", "tokenizers", "matplotlib"):
        pytest.importorskip(package)
    import demo
    import execute

    # A download is told, once, in the output of the cell that needs the file.
    for name in set(re.findall(r"demo\.(\w+)\(\)", path.read_text("utf-8"))):
        getattr(demo, name)()
    # The kernel finds q4jax where this process did, installed or not.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = execute.execute(path)  # raises the error of a cell
    warnings = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not warnings
    kinds = [
        [[o["output_type"] for o in cell.get("outputs", [])] for cell in found]
        for found in (notebook.cells, cells(path))
    ]
    assert kinds[0] == kinds[1]  # stored outputs are those of these cells
