"""Call Pallas with named operands, and mask tiles that reach beyond an array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from q4jax.gpu.requirements import triton

# Before jax 0.12 the lowering does not find any cache modifier by its name.
_HAS_CACHE_MODIFIERS = jax.__version_info__ >= (0, 12)


def launch(
    name: str,
    kernel: Callable[..., None],
    operands: dict[str, Array],
    out_shape: Any,
    grid: tuple[int, ...],
    *,
    interpret: bool,
    warps: int = 4,
    stages: int = 1,
) -> Any:
    """Run `kernel(refs, *results)`, where `refs` has a reference for each operand by its name.

    Args:
      name: of the kernel; a prefix is added.
      kernel: reads and writes through references to whole arrays.
      operands: what it reads.
      out_shape: of its results, as `pl.pallas_call` takes them.
      grid: programs.
      interpret: simulate it.
      warps: of a program.
      stages: of the software pipeline.
    """

    def body(*refs: Any) -> None:
        kernel(dict(zip(operands, refs, strict=False)), *refs[len(operands) :])

    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid=grid,
        compiler_params=triton().CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=f"q4jax_{name}",
    )(*operands.values())


def load(ref: Any, mask: Array | None, *, cached: bool = False) -> Array:
    """Load from `ref`; 0 where masked.

    Args:
      ref: the part of an array.
      mask: what is inside the array; None: all.
      cached: keep the 32-byte sectors in the L1 cache, which a load of 16 bytes a thread straight
        to shared memory passes by, for a load of the other halves of these sectors.
    """
    other = None if mask is None else 0
    modifier = ".ca" if cached and _HAS_CACHE_MODIFIERS else None
    return triton().load(ref, mask=mask, other=other, cache_modifier=modifier)


def below(shape: tuple[int, ...], axis: int, first: Any, limit: int) -> Array:
    """Where `first` plus the index along `axis` is below `limit`."""
    return first + lax.broadcasted_iota(jnp.int32, shape, axis) < limit


def rows_inside(shape: tuple[int, ...], first: Any, count: int) -> Array | None:
    """`below` along the first axis; None where tiles of that height fill `count` rows exactly."""
    return None if count % shape[0] == 0 else below(shape, 0, first, count)


def add_splits(parts: Array, bias: Array | None, dtype: Any) -> Array:
    """[splits, M, N] -> [M, N]: shares of a sum in float32, added in one order, rounded once."""
    if len(parts) == 1:
        return parts[0]
    total = parts.sum(0)
    return (total if bias is None else total + bias[None].astype(jnp.float32)).astype(dtype)
