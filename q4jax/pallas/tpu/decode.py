"""Decode a tile of codes in registers, with its columns of K in the order that costs nothing.

The bytes lie transposed, `[K / 2, N]`. A word of four bytes down a column holds the weights
8i, ..., 8i + 7 of one output feature, so the 64 weights of 8 sublanes share one scale from block
size 64 on. Byte b of the words gives the weights 8i + 2b and 8i + 2b + 1: a plane. Planes are put
below each other as they come, and the activation's columns are put into that order instead
(`q4jax.pallas.tpu.order`), because those are fewer.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from q4jax.core import codebooks
from q4jax.pallas.tpu.registers import (
    SUBLANES,
    column,
    look_up,
    pack_bfloat16,
    pack_halves,
    shift_right,
)

GROUP = 64
"""The weights of a column in a register of words."""

_UPPER = 16  # the shift from a table entry's low half to its high half


def shift_of(nibble: int) -> int:
    """The place of weight 8i + `nibble` in a word: a byte's high nibble comes first."""
    return 8 * (nibble // 2) + 4 * (1 - nibble % 2)


def decode_tile(
    packed: Array,
    scale: Callable[[int], Array],
    *,
    quant_type: str,
    blocksize: int,
    dtype: np.dtype,
    interpret: bool,
) -> Array:
    """uint8 `[K / 2, C]` -> `dtype` `[K, C]`, rows in the order of `q4jax.pallas.tpu.order`.

    Args:
      packed: the bytes.
      scale: the number of a weight's row -> the scale of its block, float32 `[1, C]`.
      quant_type: of the codes.
      blocksize: weights of a scale.
      dtype: float32 or bfloat16.
      interpret: whether the kernel is simulated.
    """
    words = pltpu.bitcast(packed, jnp.int32)
    parts, tables = [], None
    for first in range(0, 2 * packed.shape[0], GROUP):
        own = words[first // 8 : first // 8 + SUBLANES]
        if dtype == jnp.float32 or blocksize < GROUP:
            scales = scales_of(scale, first, blocksize, own.shape)
            planes = planes_float32(own, scales, quant_type=quant_type, interpret=interpret)
            parts += _in_order(planes, dtype, interpret)
        else:
            if first % blocksize == 0 or tables is None:
                tables = _scaled_table(scale(first), quant_type, own.shape, interpret)
            parts += _pairs_bfloat16(own, tables, interpret)
    return jnp.concatenate(parts, axis=0)


def planes_float32(words: Array, scales: Array, *, quant_type: str, interpret: bool) -> list[Array]:
    """int32 and float32 `[8, C]` -> the weights 8i + j of the words, for j = 0, ..., 7."""
    values = codebooks.CODEBOOKS[quant_type].values
    low, high = (column(half, words.shape[1], jnp.float32) for half in (values[:8], values[8:]))
    planes = []
    for nibble in range(8):
        shift = shift_of(nibble)
        index = shift_right(words, shift)
        upper = (words & np.int32(np.uint32(8 << shift).astype(np.int32))) != 0
        below = look_up(low, index, 0, interpret=interpret)
        above = look_up(high, index, 0, interpret=interpret)
        planes.append(jnp.where(upper, above, below) * scales)
    return planes


def scales_of(
    scale: Callable[[Any], Array], first: Any, blocksize: int, shape: tuple[int, ...]
) -> Array:
    """The scales of a register of words: two in a column for blocks of 32."""
    scales = jnp.broadcast_to(scale(first), shape)
    if blocksize >= GROUP:
        return scales
    sublane = lax.broadcasted_iota(jnp.int32, shape, 0)
    second = jnp.broadcast_to(scale(first + blocksize), shape)
    return jnp.where(sublane < SUBLANES // 2, scales, second)


def _in_order(planes: list[Array], dtype: np.dtype, interpret: bool) -> list[Array]:
    """The planes as they are, or the two of each byte in bfloat16 rows 2i and 2i + 1."""
    if dtype == jnp.float32:
        return planes
    pairs = [
        pack_bfloat16(*planes[nibble : nibble + 2], interpret=interpret)
        for nibble in range(0, 8, 2)
    ]
    return [pltpu.bitcast(pair, jnp.bfloat16) for pair in pairs]


def _scaled_table(scale: Array, quant_type: str, shape: tuple[int, ...], interpret: bool) -> Array:
    """The weights of a block's 16 codes, rounded: word i has those of the codes i and i + 8."""
    values = codebooks.CODEBOOKS[quant_type].values
    scales = jnp.broadcast_to(scale, shape)
    low, high = (column(half, shape[1], jnp.float32) * scales for half in (values[:8], values[8:]))
    return pack_bfloat16(low, high, interpret=interpret)


def _pairs_bfloat16(words: Array, table: Array, interpret: bool) -> list[Array]:
    """Four planes of two weights a word, as bfloat16 `[16, C]`.

    Three bits of a code find a word of the table, and the fourth the half of it.
    """

    def entry(nibble: int) -> Array:
        shift = shift_of(nibble)
        both = look_up(table, shift_right(words, shift), 0, interpret=interpret)
        return shift_right(both, shift_right(words, shift - 1) & _UPPER)

    pairs = [
        pack_halves(entry(nibble), entry(nibble + 1), interpret=interpret)
        for nibble in range(0, 8, 2)
    ]
    return [pltpu.bitcast(pair, jnp.bfloat16) for pair in pairs]
