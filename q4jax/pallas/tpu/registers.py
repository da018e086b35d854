"""The operations of a TPU's vector unit that the kernels are made of, and their simulation.

A register is 8 sublanes of 128 lanes of 32 bits. Two values of 16 bits share a word: rows 2i and
2i + 1 of an array. Pallas's interpreter lacks `pack_elementwise`, and its gathers clamp an index
where the unit takes it modulo the size of the axis; each such operation has a second form here.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

SUBLANES, LANES = 8, 128


def shift_right(words: Array, by: int | Array) -> Array:
    """Shift int32 words right, zeros coming in; to the left for a negative `by`."""
    if isinstance(by, int):
        if by == 0:
            return words
        if by < 0:
            return lax.shift_left(words, jnp.full_like(words, -by))
        by = jnp.full_like(words, by)
    return lax.shift_right_logical(words, by)


def look_up(table: Array, index: Array, axis: int, *, interpret: bool) -> Array:
    """Take `table[index mod 8, lane]` along axis 0, or `table[row, index mod 128]` along axis 1.

    Args:
      table: 32 bits `[8, C]`, or `[R, 128]` along axis 1.
      index: int32 of the result's shape, `[8, C]` or `[R, 128]`.
      axis: the table's.
      interpret: whether the kernel is simulated.
    """
    if interpret:
        index = index & (table.shape[axis] - 1)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    return lax.gather(
        table,
        index[..., None],
        numbers,
        slice_sizes=(1, 1),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def pack_bfloat16(low: Array, high: Array, *, interpret: bool) -> Array:
    """Round two float32 arrays to bfloat16 and put them into the halves of int32 words."""
    if interpret:
        halves = (lax.bitcast_convert_type(a.astype(jnp.bfloat16), jnp.uint16) for a in (low, high))
        return _join(*halves)
    packed = pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
    return lax.bitcast_convert_type(packed, jnp.int32)


def pack_halves(low: Array, high: Array, *, interpret: bool) -> Array:
    """Put the low halves of two arrays of words into the halves of int32 words."""
    if interpret:
        return _join(low, high)
    packed = pltpu.pack_elementwise([low, high], packed_dtype=jnp.int16)
    return lax.bitcast_convert_type(packed, jnp.int32)


def _join(low: Array, high: Array) -> Array:
    low, high = low.astype(jnp.int32), high.astype(jnp.int32)
    return (low & 0xFFFF) | (high << 16)


def column(values: Any, lanes: int, dtype: DTypeLike) -> Array:
    """[n] -> [n, lanes]: constants down the sublanes."""
    rows = [jnp.full((1, lanes), value, dtype) for value in values]
    return jnp.concatenate(rows, axis=0)
