"""Rows of a 4-bit table: what an embedding needs, without decoding the rest."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from q4jax import blockwise, codebooks
from q4jax.params import Params4bit
from q4jax.spec import float_dtype


def take_rows(weight: Params4bit, ids: Array, dtype: Any = None) -> Array:
    """`dequantize_4bit(weight)[ids]`, decoding only the rows asked for.

    Args:
      weight: a 2-D table `[rows, features]`.
      ids: integers of any shape; one out of range gives NaN, as `jnp.take` does.
      dtype: dtype of the result; None: the dtype the table was quantized from.

    Returns:
      `[*ids.shape, features]`.

    Raises:
      ValueError: ids are not integers; the table is not 2-D.
    """
    weight = Params4bit.of(weight, None)
    state = weight.quant_state
    if len(state.shape) != 2:
        raise ValueError(f"take_rows: quant_state.shape must be 2D, got {list(state.shape)}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    rows, features = state.shape
    dtype = state.dtype if dtype is None else float_dtype(dtype)
    ids = jnp.where(ids < 0, ids + rows, ids)[..., None]
    inside = (ids >= 0) & (ids < rows)
    row = jnp.where(inside, ids, 0)
    # Whole rows of codes where rows hold whole blocks, else element by element.
    if state.spec.in_rows:
        nibbles = blockwise.unpack(weight.packed[row[..., 0]])
        blocks = features // state.blocksize
        scales = _scales(weight, row * blocks + jnp.arange(blocks))
        scales = jnp.repeat(scales, state.blocksize, axis=-1)
    else:
        element = row * features + jnp.arange(features)
        pair = weight.packed[element // 2]
        nibbles = jnp.where(element % 2 == 0, pair >> 4, pair & 15)
        scales = _scales(weight, element // state.blocksize)
    values = jnp.asarray(codebooks.CODE[state.quant_type])[nibbles] * scales
    return jnp.where(inside, values, jnp.nan).astype(dtype)


def _scales(weight: Params4bit, block: Array) -> Array:
    """Float32 scales of the blocks of these numbers."""
    state = weight.quant_state
    scales = state.absmax.reshape(-1)[block]
    if state.nested_absmax is None or state.offset is None:
        return scales
    return blockwise.decode_absmax_at(block, scales, state.nested_absmax, state.offset)
