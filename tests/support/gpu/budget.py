"""What a weight asks of each resource of a multiprocessor, in a product's loop over the weight.

    python -m tests.support.gpu.budget sm_90 1 16x64x64x4x3

The arguments are M and tiles: m x n x k x warps x stages. Shared memory and the L2 cache are
counted as the PTX is executed, ALU and issue slots in the machine code. Two launches that differ by
some steps of the loop are compared, so that nothing counts but the loop. It prints JSON.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from q4jax.gpu import tiles
from q4jax.ops import registry
from tests.support.gpu import cubin
from tests.support.gpu.targets import compile_for, mesh_of
from tests.support.ptx.counters import CountingMachine
from tests.support.ptx.launches import Executor
from tests.support.random_arrays import normal, random_weight

# Opcodes that run on the ALU pipe.
ALU = ("PRMT", "SHF", "LOP3", "F2FP", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "PLOP3", "MOV")
ALU_LANES, ISSUE_LANES = 64, 128  # a clock and multiprocessor
STEPS = 3  # of the loop, by which the two launches differ; few enough that no sum is split


def budget(gpu: str, m: int, tile: tiles.Tile) -> dict[str, float]:
    """What a weight asks for, of `x @ W.T` with M rows in bfloat16, nf4 and blocks of 64.

    Where a tile has fewer than M rows of x, a weight is decoded for each of the tiles.

    Returns:
      "shared": wavefronts; "sectors"; "alu" and "issue": instructions; and "ceiling": the weights
      a clock and multiprocessor that the scarcest of them but sectors allows.
    """
    jax.clear_caches()  # what was traced with another tile
    first, second = (_counts(gpu, m, tile, steps) for steps in (STEPS, 2 * STEPS))
    weights = tile.n * tile.k * STEPS
    each = {name: (second[name] - first[name]) / weights for name in first}
    loop = _loop(gpu, m, tile)
    of_thread = tile.n * tile.k / (32 * tile.warps)
    times = _times(m, tile)
    alu = times * sum(n for name, n in loop.items() if name.startswith(ALU)) / of_thread
    issue = times * sum(loop.values()) / of_thread
    shared = sum(each[name] for name in ("load", "store", "copy", "wgmma"))
    ceiling = min(1 / shared, ALU_LANES / alu, ISSUE_LANES / issue)
    found = {"shared": shared, "sectors": each["sectors"], "alu": alu, "issue": issue}
    return {name: round(value, 5) for name, value in (found | {"ceiling": ceiling}).items()}


def _call(m: int, shape: tuple[int, int], tile: tiles.Tile) -> tuple[Any, tuple[Any, Any]]:
    """A product on the implementation's own level, and its operands."""
    weight = random_weight(shape, 64, False, dtype="bfloat16")
    linear = functools.partial(
        registry.IMPLEMENTATIONS["pallas"].linear, bias=None, spec=weight.quant_state.spec
    )

    def product(x: Any, arrays: Any) -> Any:
        with tiles.override(tile):
            return linear(x, arrays)

    return product, (normal(1, m, shape[1], dtype="bfloat16"), weight.arrays)


def _counts(gpu: str, m: int, tile: tiles.Tile, steps: int) -> dict[str, int]:
    """What programs of so many steps count."""
    product, operands = _call(m, (tile.n, tile.k * steps), tile)
    executor = Executor(gpu, CountingMachine)
    executor(product, *operands)
    [launch] = executor.launches
    assert launch.launch.grid == (_times(m, tile), 1, 1), launch.launch
    return launch.counts


def _times(m: int, tile: tiles.Tile) -> int:
    """How many tiles the rows of x have, and programs a weight."""
    return -(-m // tile.m)


def _loop(gpu: str, m: int, tile: tiles.Tile) -> dict[str, int]:
    """The instructions of a thread in a step of the loop, in machine code."""
    product, operands = _call(m, (4096, 4096), tile)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    return cubin.kernels(compile_for(mesh_of(gpu), product, *abstract))["q4jax_linear"].loop


if __name__ == "__main__":
    gpu, m, *names = sys.argv[1:]
    jnp.zeros(())  # starts jax before the compiler
    found = {name: budget(gpu, int(m), tiles.Tile(*map(int, name.split("x")))) for name in names}
    json.dump(found, sys.stdout)
