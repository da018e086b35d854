"""Call a Pallas kernel for TPUs with scalars that the index maps read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Interpret = Any
"""False: compile a kernel; True: simulate its blocks by XLA; `pltpu.InterpretParams`: simulate the
memories and the copies of a TPU too, with callbacks, which `custom_partitioning` does not take."""

_VMEM_BYTES = 48 << 20
"""What a kernel may ask of the vector memory: less than the smallest of the served chips has."""


def launch(
    name: str,
    kernel: Callable[..., None],
    scalars: Sequence[Array],
    operands: Sequence[tuple[Any, Any, Any]],
    out_shape: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    out_block: Any,
    grid: tuple[int, ...],
    *,
    interpret: Interpret,
    scratch: Sequence[Any] = (),
    sums: int = 0,
) -> Any:
    """Run `kernel(*scalars, *operands, *results, *scratch, interpret=interpret)`.

    Args:
      name: of the kernel; a prefix is added.
      kernel: reads and writes blocks.
      scalars: int32 arrays, known before the grid runs.
      operands: each with the shape of its block and the index map of it; or a `pl.BlockSpec`.
      out_shape: of the result, or of each.
      out_block: the shape of its block and the index map, or those of each result.
      grid: steps, the last axis innermost.
      interpret: whether to simulate it, and how.
      scratch: shapes in the vector memory.
      sums: how many of the last axes of the grid work on one block of the results.
    """
    several = isinstance(out_shape, Sequence)
    out_blocks = [pl.BlockSpec(*block) for block in (out_block if several else [out_block])]
    semantics: list[Any] = ["parallel"] * (len(grid) - sums) + ["arbitrary"] * sums
    return pl.pallas_call(
        functools.partial(kernel, interpret=bool(interpret)),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[
                block if index is None else pl.BlockSpec(block, index)
                for _, block, index in operands
            ],
            out_specs=out_blocks if several else out_blocks[0],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name=f"q4jax_tpu_{name}",
    )(*scalars, *(operand for operand, _, _ in operands))
