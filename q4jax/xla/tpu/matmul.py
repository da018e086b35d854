"""Products with a matrix of whole blocks and plain scales, and the matrix itself, for TPUs.

The high nibbles of a weight's bytes are its even columns and the low ones its odd columns. They are
decoded apart, and it is x that is split into even and odd columns: a product is the sum of two.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import codebooks
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.xla.tpu import lanes, scales
from q4jax.xla.tpu.chunks import ROWS, cut, over, over_rows

_FEW_ROWS = 128
_CHUNK_ELEMENTS = 2**24  # of the weight, decoded at a time: they fit into a TPU's own memory
_CHUNK_BESIDE_MANY_ROWS = 2**23  # leaves room for the split x of many rows
_COLUMNS = 256  # of the weight, whose bytes lie in whole registers
_FEWEST_COLUMNS = 1024  # of a result that are made at a time, since each run of them reads g
_DENSE_CHUNK_ELEMENTS = 2**21
_ROWS_A_WORD = 4


def linear(x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec) -> Array:
    """Return `x @ W.T + bias` for `x [M, K]`: `[M, N]` in x's dtype."""
    even, odd = map(operand, lanes.even_odd(x))

    def part(y: Array, first: int | Array, packed: Array, absmax: Array) -> Array:
        product = _linear_by_words if _by_words(x, packed) else _linear_by_rows
        found = product(even, odd, packed, absmax, spec, x.dtype)
        if bias is not None:
            own = lax.dynamic_slice_in_dim(bias, first, len(packed))
            found += own[None].astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(y, found.astype(x.dtype), first, 1)

    y = jnp.zeros((len(x), len(arrays.packed)), x.dtype)
    return _chunks(part, y, arrays, _chunk_elements(x, arrays))


def linear_transpose(g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
    """Return `g @ W` for `g [M, N]`: `[M, K]` in g's dtype.

    The result is made by runs of its columns, so that float32 sums over chunks of the weight's
    rows stay in a TPU's own memory; a run has one chunk where its rows are few enough.
    """
    absmax, spec = _blocks_in_chunks(arrays.absmax, spec)
    n, half = arrays.packed.shape
    elements = _chunk_elements(g, arrays)
    product = _transpose_by_words if _by_words(g, arrays.packed) else _transpose_by_rows

    def columns(y: Array, column: int | Array, width: int) -> Array:
        def rows(sums: tuple[Array, Array], row: int | Array, count: int) -> tuple[Array, Array]:
            packed, own_scales = (
                cut(array, (row, column // weights), (count, width // weights))
                for array, weights in ((arrays.packed, 2), (absmax, spec.blocksize))
            )
            found = product(cut(g, (0, row), (len(g), count)), packed, own_scales, spec)
            return sums[0] + found[0], sums[1] + found[1]

        zeros = jnp.zeros((len(g), width // 2), jnp.float32)
        even, odd = over(rows, (zeros, zeros), n, most=elements // width, unit=ROWS)
        found = lanes.interleave(even.astype(g.dtype), odd.astype(g.dtype))
        return lax.dynamic_update_slice_in_dim(y, found, column, 1)

    y = jnp.zeros((len(g), 2 * half), g.dtype)
    most = max(elements // n, _FEWEST_COLUMNS)
    return over(columns, y, 2 * half, most=most, unit=_COLUMNS)


def _blocks_in_chunks(absmax: Array, spec: QuantSpec) -> tuple[Array, QuantSpec]:
    """Take a block for several of the size of a chunk's unit, where it is larger."""
    several = spec.blocksize // _COLUMNS
    if several <= 1:
        return absmax, spec
    return jnp.repeat(absmax, several, axis=1), dataclasses.replace(spec, blocksize=_COLUMNS)


def dequantize(arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
    """Return the matrix, rounded once to `dtype`."""

    def part(w: Array, first: int | Array, packed: Array, absmax: Array) -> Array:
        found = lanes.interleave(*_rows_of(packed, absmax, spec, dtype))
        return lax.dynamic_update_slice_in_dim(w, found, first, 0)

    n, half = arrays.packed.shape
    return _chunks(part, jnp.zeros((n, 2 * half), dtype), arrays, _DENSE_CHUNK_ELEMENTS)


def _chunk_elements(x: Array, arrays: WeightArrays) -> int:
    whole = 2 * arrays.packed.size <= _CHUNK_ELEMENTS
    return _CHUNK_ELEMENTS if whole or len(x) <= _FEW_ROWS else _CHUNK_BESIDE_MANY_ROWS


def _chunks(part: Callable[..., Any], carry: Any, arrays: WeightArrays, elements: int) -> Any:
    """Fold over chunks of the weight's rows: their first row, codes and scales."""
    columns = 2 * arrays.packed.shape[1]
    return over_rows(part, carry, *arrays[:2], columns=columns, elements=elements)


def _by_words(x: Array, packed: Array) -> bool:
    """Whether the weight's transpose is decoded: there its scales, not its columns, are cheap."""
    return len(x) <= _FEW_ROWS and len(packed) % _ROWS_A_WORD == 0


def operand(x: Array) -> Array:
    """What a product takes: float16, which TPUs do not multiply, as float32."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def dot(x: Array, w: Array, x_axis: int, w_axis: int) -> Array:
    """The product in float32, of float32 operands too."""
    contract = (((x_axis,), (w_axis,)), ((), ()))
    return lax.dot_general(
        x, operand(w), contract, precision="highest", preferred_element_type=jnp.float32
    )


def _decode(bits: Array, lowest: int, absmax: Array, spec: QuantSpec, dtype: Any) -> Array:
    """The values of the codes that begin at the bit `lowest`, rounded once to `dtype`."""
    values = codebooks.CODEBOOKS[spec.quant_type].values
    return (scales.look_up(values, bits, lowest) * absmax).astype(dtype)


def _rows_of(packed: Array, absmax: Array, spec: QuantSpec, dtype: Any) -> tuple[Array, Array]:
    """The even and the odd columns of the weight, `[N, K/2]`."""
    repeated, bits = lanes.repeat(absmax, spec.blocksize // 2), packed.astype(jnp.int32)
    high, low = (_decode(bits, lowest, repeated, spec, dtype) for lowest in (4, 0))
    return high, low


def _linear_by_rows(even, odd, packed, absmax, spec, dtype):
    high, low = _rows_of(packed, absmax, spec, dtype)
    return dot(even, high, 1, 1) + dot(odd, low, 1, 1)


def _transpose_by_rows(g, packed, absmax, spec):
    high, low = _rows_of(packed, absmax, spec, g.dtype)
    return dot(operand(g), high, 1, 0), dot(operand(g), low, 1, 0)


def _words(packed: Array, absmax: Array, spec: QuantSpec, dtype: Any) -> list[tuple[Array, Array]]:
    """The even and the odd columns of every fourth row, `[K/2, N/4]`, from each of the first four.

    Four rows of bytes lie in one row of 32-bit words, as TPUs store them. Transposed, a scale is
    repeated along sublanes, which costs nothing. The words are a quarter of the bytes' number to
    transpose.
    """
    n, half = packed.shape
    fours = jnp.swapaxes(packed.reshape(n // _ROWS_A_WORD, _ROWS_A_WORD, half), 1, 2)
    words = lax.bitcast_convert_type(fours, jnp.uint32).T
    found = []
    for row in range(_ROWS_A_WORD):
        repeated = jnp.repeat(absmax[row::_ROWS_A_WORD].T, spec.blocksize // 2, axis=0)
        bits = (8 * row + 4, 8 * row)
        high, low = (_decode(words, lowest, repeated, spec, dtype) for lowest in bits)
        found.append((high, low))
    return found


def _linear_by_words(even, odd, packed, absmax, spec, dtype):
    parts = [
        dot(even, high, 1, 0) + dot(odd, low, 1, 0)
        for high, low in _words(packed, absmax, spec, dtype)
    ]
    return jnp.stack(parts, axis=2).reshape(len(even), len(packed))


def _transpose_by_words(g, packed, absmax, spec):
    parts = []
    for row, (high, low) in enumerate(_words(packed, absmax, spec, g.dtype)):
        own = operand(g[:, row::_ROWS_A_WORD])
        parts.append((dot(own, high, 1, 1), dot(own, low, 1, 1)))
    return tuple(functools.reduce(jnp.add, half) for half in zip(*parts, strict=True))
