"""What the last program of each kernel reads and writes of huge arrays, which need not exist.

    python -m tests.support.gpu.extents sm_90

It prints JSON: a cell's name -> for each array of its kernel an `Extent`.
"""

import collections
import dataclasses
import json
import math
import re
import sys
import tempfile
from pathlib import Path

from tests.support.gpu.addresses import Access, Program
from tests.support.gpu.cells import HUGE, Cell
from tests.support.gpu.compile_kernels import compile_for, mesh_of, program

_IN_L1 = 8
_BYTES = {"pred": 1, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Extent:
    """The part of an array that a program accesses.

    Attributes:
      array: its type in HLO, such as "s32[64,16]".
      size: its bytes.
      write: whether it is written.
      first, end: the least offset in bytes, and the largest plus one.
      sectors: 32-byte sectors that warps ask the L2 cache for. One that a warp asked for by one of
        its last accesses to the array is in the L1 cache, if both went through it.
      least_sectors: as many as hold what they ask for, if each instruction of a warp were dense.
    """

    array: str
    size: int
    write: bool
    first: int
    end: int
    sectors: int
    least_sectors: float


def extents(gpu: str, cell: Cell) -> list[Extent]:
    """Run the last program of a cell's kernel."""
    function, args = program(cell)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        text = compile_for(mesh_of(gpu), function, *args, **options).as_text()
        modules = [path.read_text() for path in Path(folder).glob("*.ptx")]
    [call] = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    arrays = _arrays(call)
    grid = [int(re.findall(rf"grid_{axis} = (\d+)", call)[0]) for axis in "xyz"]
    name = f"q4jax_{cell.operation}"
    [ptx] = [module for module in modules if f".entry {name}(" in module]
    last = grid[0] - 1, grid[1] - 1, grid[2] - 1
    loaded = {i: cell.layers - 1 for i, array in enumerate(arrays) if array == "s32[1]"}
    accesses = Program(ptx, name, last, loaded).run()
    found = []
    for number, array in enumerate(arrays):
        mine = [access for access in accesses if access.array == number]
        found.append(
            Extent(
                array,
                _size(array),
                any(a.write for a in mine),
                min(int(a.offsets.min()) for a in mine),
                max(int(a.offsets.max()) + a.size for a in mine),
                _sectors(mine),
                sum(len(a.offsets) * a.size for a in mine) / 32,
            )
        )
    return found


def _sectors(accesses: list[Access]) -> int:
    recent: collections.deque[set[tuple[int, int]]] = collections.deque(maxlen=_IN_L1)
    count = 0
    for access in accesses:
        sectors = access.sectors()
        count += len(sectors.difference(*recent) if access.cached else sectors)
        recent.append(sectors if access.cached else set())
    return count


def _arrays(call: str) -> list[str]:
    """The operands and the results of a custom call, as the kernel's parameters are ordered."""
    operands = re.findall(r"operand_layout_constraints=\{(.*?\})\}", call)[0]
    results = call.split(" = ")[1].split(" custom-call(")[0]
    return re.findall(r"\w+\[[\d,]*\]", operands) + re.findall(r"\w+\[[\d,]*\]", results)


def _size(array: str) -> int:
    kind, shape = re.fullmatch(r"(\w+)\[(.*)\]", array).groups()  # type: ignore[union-attr]
    width = _BYTES.get(kind) or int(re.sub(r"\D", "", kind)) // 8
    return width * math.prod(int(n) for n in shape.split(",") if n)


if __name__ == "__main__":
    [gpu] = sys.argv[1:]
    found = {cell.name: [dataclasses.asdict(e) for e in extents(gpu, cell)] for cell in HUGE}
    json.dump(found, sys.stdout)
