"""Products with a 4-bit weight in plain XLA: in tiles on CPU, of the decoded weight elsewhere.

On CPU a weight is never complete in memory. A tile is decoded by looking up one byte, two
elements, at a time: the decoded pair lands in its place, so no nibbles are interleaved, and the
lookup is one 64-bit load. The tile then goes through one dot while it is still in cache.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.xla.tiling import as_bits, as_float, choose, decode, fold

_FLAT_TILE_ROWS = 256


def decode_first(
    x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec, transpose: bool
) -> Array:
    """Decode the weight, then compute one dot: `x @ W.T + bias`, or `x @ W` where `transpose`."""
    return finish(_dot(x, arrays, spec, transpose=transpose), bias, x.dtype)


def tiled(
    x: Array,
    arrays: WeightArrays,
    bias: Array | None,
    *,
    spec: QuantSpec,
    transpose: bool,
    elements: int | None = None,
    upcast: bool | None = None,
) -> Array:
    """Decode and multiply a tile of the weight at a time, accumulating in float32.

    Args:
      x: `[M, K]`, or `[M, N]` where `transpose`.
      arrays: the weight `[N, K]`.
      bias: `[N]`, or None.
      spec: the weight's description.
      transpose: whether to compute `x @ W` instead of `x @ W.T + bias`.
      elements: elements of the weight that are decoded at a time; None takes the table's.
      upcast: whether to convert the dot's operands, rounded to x's dtype, to float32, which changes
        no product; None takes the table's.

    Returns:
      `[M, N]`, or `[M, K]` where `transpose`, in x's dtype, rounded once.
    """
    absmax = blockwise.decode_absmax(arrays.absmax, arrays.nested_absmax, arrays.offset)
    if not spec.in_rows:
        y = tiled_flat(x, arrays.packed, absmax, spec, _dot, transpose=transpose)
        return finish(y, bias, x.dtype)
    return _tiled_rows(x, arrays.packed, absmax, bias, spec, transpose, elements, upcast)


def _dot(x: Array, arrays: WeightArrays, spec: QuantSpec, *, transpose: bool) -> Array:
    """The product in float32."""
    w = blockwise.dequantize(arrays, spec, x.dtype)
    contract = (((1,), (0 if transpose else 1,)), ((), ()))
    return lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)


def finish(y: Array, bias: Array | None, dtype: np.dtype[Any]) -> Array:
    """Add the bias in float32, then round once to `dtype`."""
    return (y if bias is None else y + bias[None].astype(jnp.float32)).astype(dtype)


def _column_tile(columns: int, blocksize: int) -> int:
    """The largest number of columns up to `columns` that are whole blocks or part of one."""
    if columns >= blocksize:
        return columns - columns % blocksize
    return 1 << max(columns.bit_length() - 1, 4)


def _tiled_rows(
    x: Array,
    packed: Array,
    absmax: Array,
    bias: Array | None,
    spec: QuantSpec,
    transpose: bool,
    elements: int | None,
    upcast: bool | None,
) -> Array:
    """The product where rows are whole blocks.

    A tile of the result is the sum over chunks of the contraction. There is one chunk, unless x
    has 16 bits, where a chunk bounds the part of x that is converted or that XLA copies for a dot,
    or the result of `transpose` is small, where adding to all of it is faster than tiles of a few
    columns.
    """
    blocksize = spec.blocksize
    m, n, k = x.shape[0], packed.shape[0], packed.shape[1] * 2
    table_elements, table_upcast = choose("linear_transpose" if transpose else "linear", m, x.dtype)
    elements = elements or table_elements
    dot_dtype = jnp.float32 if (table_upcast if upcast is None else upcast) else x.dtype
    converts = dot_dtype != x.dtype
    contraction, outputs = (n, k) if transpose else (k, n)
    if transpose and 2 * m * k <= elements:
        size, chunk = k, max(elements // k // 16 * 16, 16)
    elif x.dtype.itemsize == 2 and m * contraction > (part := elements * (1 if converts else 4)):
        chunk = max(part // m, 16)
        size = max(elements // chunk, 16)
    else:
        chunk = contraction
        size = max(elements // chunk // 16 * 16, 16)
    # A tile of columns is whole blocks, or lies in one.
    if transpose and size < k:
        size = _column_tile(size, blocksize)
    if not transpose and chunk < k:
        chunk = _column_tile(chunk, blocksize)
    chunk = min(chunk, contraction)

    x_bits = as_bits(x)

    def weight(row, rows, column, columns):
        codes = lax.dynamic_slice(packed, (row, column // 2), (rows, columns // 2))
        block, blocks = column // blocksize, max(columns // blocksize, 1)
        scales = lax.dynamic_slice(absmax, (row, block), (rows, blocks))
        w = decode(codes, scales, quant_type=spec.quant_type, dtype=x.dtype)
        return w.astype(dot_dtype)

    def tile(start, size, y):
        def add(at, chunk, total):
            # The barrier keeps XLA from converting all of x before the loop.
            xs = lax.optimization_barrier(lax.dynamic_slice_in_dim(x_bits, at, chunk, 1))
            xs = as_float(xs, x.dtype).astype(dot_dtype)
            w = weight(at, chunk, start, size) if transpose else weight(start, size, at, chunk)
            form = "mc,cs->ms" if transpose else "mc,sc->ms"
            part = jnp.einsum(form, xs, w, preferred_element_type=jnp.float32)
            return part if total is None else total + part

        zero = None if chunk == contraction else jnp.zeros((m, size), jnp.float32)
        total = fold(contraction, chunk, add, zero)  # [M, size]
        if bias is not None:
            total += lax.dynamic_slice_in_dim(bias, start, size)[None].astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(y, as_bits(total.astype(x.dtype)), start, 1)

    y = fold(outputs, size, tile, jnp.zeros((m, outputs), x_bits.dtype))
    return as_float(y, x.dtype)


def tiled_flat(
    x: Array,
    packed: Array,
    absmax: Array,
    spec: QuantSpec,
    dot: Callable[..., Array],
    *,
    transpose: bool,
) -> Array:
    """Compute the product in float32 where blocks cross rows, by tiles of whole rows and blocks.

    Args:
      x: `[M, K]`, or `[M, N]` where `transpose`.
      packed: the codes.
      absmax: the plain scales.
      spec: the weight's description.
      dot: the product with a tile, `dot(x, arrays, spec, transpose=)`, in float32.
      transpose: whether to compute `x @ W` instead of `x @ W.T`.
    """
    n, k = spec.shape
    unit = math.lcm(spec.blocksize, 2 * k) // k
    rows = unit * max(1, _FLAT_TILE_ROWS // unit)

    def part(i: int | Array, size: int) -> Array:
        """The product with the `size` rows of the i-th tile."""
        tile = QuantSpec.from_shape((size, k), spec.dtype, spec.quant_type, spec.blocksize, False)
        first_byte, first_block = i * (rows * k // 2), i * (rows * k // spec.blocksize)
        codes = lax.dynamic_slice_in_dim(packed, first_byte, tile.packed_shape[0])
        scales = lax.dynamic_slice_in_dim(absmax, first_block, tile.absmax_shape[0])
        xs = lax.dynamic_slice_in_dim(x, i * rows, size, 1) if transpose else x
        return dot(xs, WeightArrays(codes, scales, None, None), tile, transpose=transpose)

    tiles, rest = divmod(n, rows)
    last = [part(tiles, rest)] if rest else []
    if not tiles:
        return last[0]
    indices = jnp.arange(tiles)
    if transpose:
        zero = jnp.zeros((x.shape[0], k), jnp.float32)
        total, _ = lax.scan(lambda dx, i: (dx + part(i, rows), None), zero, indices)
        return sum(last, total)
    stacked = lax.map(lambda i: part(i, rows), indices)  # [tiles, M, rows]
    full = jnp.moveaxis(stacked, 0, 1).reshape(x.shape[0], tiles * rows)
    return jnp.concatenate([full, *last], axis=1)
