"""Run notebooks and store their outputs.

    python notebooks/execute.py                           # all of them, in place
    python notebooks/execute.py notebooks/01_*.ipynb      # some

Needs the extras `test` and `examples`. What a run adds to a notebook beside its outputs, such as
times and the version of Python, is left out, so that a second run changes only outputs.
"""

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
LIMIT = 600  # seconds a cell


def execute(path: Path) -> Any:
    """Run a notebook and return it with the new outputs; errors in cells are raised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb")))):
        start = time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size // 1024} KB")
