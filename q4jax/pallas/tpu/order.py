"""The order in which `decode_tile` gives the rows of a tile, for the activations that meet them.

It permutes each 64 neighbours. A lane gather moves whole values, so it is exact for all of them.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from q4jax.pallas.tpu.decode import GROUP
from q4jax.pallas.tpu.registers import LANES, look_up


def _to_place(column: Array, dtype: np.dtype) -> Array:
    """The place at which a decoded tile has the weight of a column."""
    # By bits, as division rounds by a sign that no column has.
    word, nibble = (column >> 3) & 7, column & 7
    if dtype == jnp.float32:  # the planes of single nibbles
        place = (nibble << 3) | word
    else:  # those of bytes, whose two weights are neighbours
        place = ((nibble >> 1) << 4) | (word << 1) | (nibble & 1)
    return (column & -GROUP) | place


def _from_place(place: Array, dtype: np.dtype) -> Array:
    """The column whose weight a decoded tile has at a place."""
    if dtype == jnp.float32:
        column = ((place & 7) << 3) | ((place >> 3) & 7)
    else:
        column = (((place >> 1) & 7) << 3) | (((place >> 4) & 3) << 1) | (place & 1)
    return (place & -GROUP) | column


def as_decoded(x: Array, dtype: np.dtype, *, interpret: bool) -> Array:
    """Put the columns of x `[M, K]` in the order of the rows of a tile decoded to `dtype`."""
    return _gather_lanes(x, _from_place(_lanes(), dtype), interpret)


def as_stored(y: Array, dtype: np.dtype, *, interpret: bool) -> Array:
    """The inverse of `as_decoded`."""
    return _gather_lanes(y, _to_place(_lanes(), dtype), interpret)


def _lanes() -> Array:
    return lax.broadcasted_iota(jnp.int32, (1, LANES), 1)


def zero_from(x: Array, column: Array | int) -> Array:
    """Replace the columns of x `[M, K]` from this number on, whatever they hold, by zeros."""
    words = _words(x)
    inside = lax.broadcasted_iota(jnp.int32, words.shape, 1) < column
    return _values(jnp.where(inside, words, 0), x.dtype)


def _gather_lanes(x: Array, source: Array, interpret: bool) -> Array:
    words = _words(x)
    index = jnp.broadcast_to(source, (words.shape[0], LANES))
    parts = [
        look_up(words[:, first : first + LANES], index, 1, interpret=interpret)
        for first in range(0, words.shape[1], LANES)
    ]
    return _values(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1), x.dtype)


def _words(x: Array) -> Array:
    """View x as int32, where the bfloat16 rows 2i and 2i + 1 share words."""
    return pltpu.bitcast(x, jnp.int32)


def _values(words: Array, dtype: np.dtype) -> Array:
    return pltpu.bitcast(words, dtype)
