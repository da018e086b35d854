"""Scales without gathers, which TPUs do one element at a time."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import blockwise, codebooks


def look_up(table: np.ndarray, bits: Array, lowest: int) -> Array:
    """Look an index up in a table of 2**n entries by selects.

    Args:
      table: the entries.
      bits: integers that hold the index in n bits.
      lowest: the number of the index's lowest bit.
    """
    values = [lax.full(bits.shape, entry, table.dtype) for entry in table]
    bit = lowest
    while len(values) > 1:
        is_set = (bits & np.uint32(1 << bit).astype(bits.dtype)) != 0
        values = [lax.select(is_set, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        bit += 1
    return values[0]


def decode(absmax: Array, nested_absmax: Array | None, offset: Array | None) -> Array:
    """`blockwise.decode_absmax`."""

    def one(codes: Array, nested_absmax: Array, offset: Array) -> Array:
        return _decode(codes, _per_block(nested_absmax, codes.shape), offset)

    return blockwise.decode_absmax_by(one, absmax, nested_absmax, offset)


def decode_part(
    codes: Array,
    nested_absmax: Array,
    offset: Array,
    first: Sequence[Array | int],
    whole: tuple[int, ...],
) -> Array:
    """`blockwise.decode_absmax_part`."""
    start = [jnp.asarray(index, jnp.int32) for index in first]
    nested = lax.dynamic_slice(_per_block(nested_absmax, whole), start, codes.shape)
    return _decode(codes, nested, offset)


def _decode(codes: Array, nested: Array, offset: Array) -> Array:
    value = look_up(codebooks.DYNAMIC_MAP, codes.astype(jnp.int32), 0)
    return blockwise.scale(value, nested, offset)


def _per_block(nested_absmax: Array, shape: tuple[int, ...]) -> Array:
    """The nested scale of each scale."""
    repeated = jnp.repeat(nested_absmax, codebooks.NESTED_BLOCKSIZE)
    return repeated[: int(np.prod(shape))].reshape(shape)
