"""Rows of a 4-bit table: what an embedding needs, without decoding the rest."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core.spec import float_dtype
from q4jax.ops.params import Params4bit, as_params4bit
from q4jax.ops.weight_sharding import Operation
from q4jax.sharding import partition


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
    weight = as_params4bit(weight)
    state = weight.quant_state
    if len(state.shape) != 2:
        raise ValueError(f"take_rows: quant_state.shape must be 2D, got {list(state.shape)}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    dtype = state.dtype if dtype is None else float_dtype(dtype)
    return _take(weight, ids, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _take(weight: Params4bit, ids: Array, dtype: np.dtype[Any]) -> Array:
    spec = weight.quant_state.spec
    rows = spec.shape[0]
    ids = jnp.where(ids < 0, ids + rows, ids)
    inside = (ids >= 0) & (ids < rows)
    operation = Operation("rows", None, spec, dtype)
    (found,) = partition.run(operation, jnp.where(inside, ids, 0), weight.arrays)
    return jnp.where(inside[..., None], found, jnp.nan)
