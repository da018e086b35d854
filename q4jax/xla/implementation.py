"""The implementation "xla": all operations in plain XLA, tiled on CPU, whole elsewhere."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.xla import matmul as xla

_FLAT_TILE_ROWS = 256


def quantize(w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
    """Codes and plain scales, in the spec's layout."""
    flat = functools.partial(blockwise.quantize_flat, spec=spec)
    rows = functools.partial(
        xla.quantize_rows, quant_type=spec.quant_type, blocksize=spec.blocksize
    )

    def in_layout(
        quantize: Callable[[Array], tuple[Array, Array]], w: Array
    ) -> tuple[Array, Array]:
        return blockwise.in_layout(w.shape, *quantize(w), spec)

    default = functools.partial(in_layout, flat)
    if not spec.in_rows:
        return default(w)
    return lax.platform_dependent(w, cpu=functools.partial(in_layout, rows), default=default)


def compress(absmax: Array) -> tuple[Array, Array, Array]:
    """Double quantization: codes of the scales, one scale for each 256 of them, the offset."""
    return blockwise.compress(absmax)


def dequantize(arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
    """The weight in its full shape."""
    return blockwise.dequantize(arrays, spec, dtype)


def linear(x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec) -> Array:
    """`x @ W.T + bias`: [M, K] -> [M, N] in x's dtype."""
    return _product(x, arrays, bias, spec, transpose=False)


def transposed(g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
    """`g @ W`: [M, N] -> [M, K] in g's dtype."""
    return _product(g, arrays, None, spec, transpose=True)


def _product(
    x: Array, arrays: WeightArrays, bias: Array | None, spec: QuantSpec, *, transpose: bool
) -> Array:
    return lax.platform_dependent(
        x,
        arrays,
        bias,
        cpu=functools.partial(_tiled, spec=spec, transpose=transpose),
        default=functools.partial(_whole, spec=spec, transpose=transpose),
    )


def _whole(
    x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec, transpose: bool
) -> Array:
    """Decode the weight, then one dot."""
    return _finish(_dot(x, arrays, spec, transpose=transpose), bias, x.dtype)


def _dot(x: Array, arrays: WeightArrays, spec: QuantSpec, *, transpose: bool) -> Array:
    """The product in float32."""
    w = blockwise.dequantize(arrays, spec, x.dtype)
    contract = (((1,), (0 if transpose else 1,)), ((), ()))
    return lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)


def _finish(y: Array, bias: Array | None, dtype: np.dtype[Any]) -> Array:
    """Add the bias in float32, then round once."""
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


def _tiled(
    x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec, transpose: bool
) -> Array:
    """A part of the weight at a time, decoded and used while in cache."""
    absmax = blockwise.decode_absmax(arrays.absmax, arrays.nested_absmax, arrays.offset)
    settings: dict[str, Any] = {"quant_type": spec.quant_type, "blocksize": spec.blocksize}
    if not spec.in_rows:
        y = _tiled_flat(x, arrays.packed, absmax, spec, transpose=transpose)
        return _finish(y, bias, x.dtype)
    if transpose:
        return xla.transposed(x, arrays.packed, absmax, **settings)
    return xla.linear(x, arrays.packed, absmax, bias, **settings)


def _tiled_flat(
    x: Array, packed: Array, absmax: Array, spec: QuantSpec, *, transpose: bool
) -> Array:
    """The same, in float32, where blocks cross rows: tiles of whole rows, blocks and bytes."""
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
        return _dot(xs, WeightArrays(codes, scales, None, None), tile, transpose=transpose)

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
