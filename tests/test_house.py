"""The architecture: which package may import which, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "q4jax"
# From the lowest floor up. A package imports lower floors only.
FLOORS = [
    ("core", "sharding", "disk"),
    ("gpu",),
    ("xla", "pallas", "triton", "native"),
    ("ops",),
    ("convert",),
    ("nnx", "linen"),
    ("lora", "tree"),
    ("checkpoint", "interop"),
    ("models", "integrations"),
    ("finetune",),
    ("cli",),
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def imports(nodes):
    """(line, module) of each import in these nodes; `from q4jax import core` counts as core's."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_package_has_a_floor():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    package = path.relative_to(ROOT).parts[0]
    if package not in FLOOR:
        pytest.skip("the public face imports every package")
    tree = ast.parse(path.read_text())
    for line, module in imports(ast.walk(tree)):
        _, _, rest = module.partition("q4jax.")
        target = rest.partition(".")[0]
        if module.startswith("q4jax.") and target in FLOOR and target != package:
            assert FLOOR[target] < FLOOR[package], f"{path}:{line} imports {module}"
    if FLOOR[package] < FLOOR["nnx"]:
        for line, module in imports(tree.body):
            assert module.partition(".")[0] not in ("flax", "orbax"), f"{path}:{line}: {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 300
