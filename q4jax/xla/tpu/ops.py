"""The ops of `Implementation` for TPUs, on weights of both layouts."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core import blockwise
from q4jax.core.arithmetic import TPU
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.xla.matmul import finish, tiled_flat
from q4jax.xla.tpu import matmul, scales
from q4jax.xla.tpu.quantize import double_quantize as double_quantize
from q4jax.xla.tpu.quantize import quantize_rows, ravel

_COLUMNS = 4096  # of the matrix that a flat weight is taken for: whole blocks of every size


def quantize(w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
    """Return the codes and plain scales of `w`, in the spec's layout."""
    if spec.in_rows:
        found = quantize_rows(w.reshape(-1, w.shape[-1]), spec=spec)
        return blockwise.in_layout(w.shape, *found, spec)
    flat, size = ravel(w), w.size
    padded = jnp.pad(flat, (0, -size % _COLUMNS)).reshape(-1, _COLUMNS)
    packed, absmax = (a.ravel() for a in quantize_rows(padded, spec=spec))
    if not size % spec.blocksize:
        return blockwise.in_layout(
            w.shape, packed[: size // 2], absmax[: size // spec.blocksize], spec
        )
    # The last block is a partial one, which is divided by its scale.
    blocks = size // spec.blocksize
    rest = flat[blocks * spec.blocksize :]
    last = blockwise.quantize_flat_by(TPU, rest, spec=spec, search="compare_all")
    packed = jnp.concatenate([packed[: blocks * spec.blocksize // 2], last[0]])
    absmax = jnp.concatenate([absmax[:blocks], last[1]])
    return blockwise.in_layout(w.shape, packed, absmax, spec)


def dequantize(arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
    """Return the weight in its full shape."""
    lead = arrays.packed.shape[: arrays.packed.ndim - len(spec.packed_shape)]
    plain = _plain(arrays)
    if spec.in_rows:
        return matmul.dequantize(plain, spec=spec, dtype=dtype).reshape(*lead, *spec.shape)
    if not lead:
        return _dequantize_flat(plain, spec, dtype)
    # Each weight of a stack has blocks, and padding, of its own.
    each = jax.vmap(
        lambda packed, absmax: _dequantize_flat(
            WeightArrays(packed, absmax, None, None), spec, dtype
        )
    )
    return each(plain.packed, plain.absmax).reshape(*lead, *spec.shape)


def _dequantize_flat(plain: WeightArrays, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
    """As the matrix of `_COLUMNS` columns that the same codes and scales are."""
    packed, absmax = plain.packed.ravel(), plain.absmax.ravel()
    size = math.prod(spec.shape)
    rows = -(-size // _COLUMNS)
    packed = jnp.pad(packed, (0, rows * _COLUMNS // 2 - packed.size))
    absmax = jnp.pad(absmax, (0, rows * _COLUMNS // spec.blocksize - absmax.size))
    matrix = WeightArrays(packed.reshape(rows, -1), absmax.reshape(rows, -1), None, None)
    w = matmul.dequantize(matrix, spec=spec, dtype=dtype)
    return w.ravel()[:size].reshape(spec.shape)


def linear(x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec) -> Array:
    """Return `x @ W.T + bias`."""
    if spec.in_rows:
        return matmul.linear(x, _plain(arrays), bias, spec=spec)
    return finish(_flat_product(x, arrays, spec, transpose=False), bias, x.dtype)


def linear_transpose(g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
    """Return `g @ W`."""
    if spec.in_rows:
        return matmul.linear_transpose(g, _plain(arrays), spec=spec)
    return finish(_flat_product(g, arrays, spec, transpose=True), None, g.dtype)


def _plain(arrays: WeightArrays) -> WeightArrays:
    """Decode the scales, and give rows one axis."""
    absmax = scales.decode(arrays.absmax, arrays.nested_absmax, arrays.offset)
    packed = arrays.packed.reshape(-1, arrays.packed.shape[-1])
    return WeightArrays(packed, absmax.reshape(-1, absmax.shape[-1]), None, None)


def _flat_product(x: Array, arrays: WeightArrays, spec: QuantSpec, *, transpose: bool) -> Array:
    absmax = scales.decode(arrays.absmax, arrays.nested_absmax, arrays.offset)

    def dot(x: Array, tile: WeightArrays, spec: QuantSpec, *, transpose: bool) -> Array:
        w = _dequantize_flat(tile, spec, x.dtype)
        return matmul.dot(matmul.operand(x), w, 1, 0 if transpose else 1)

    return tiled_flat(x, arrays.packed, absmax, spec, dot, transpose=transpose)
