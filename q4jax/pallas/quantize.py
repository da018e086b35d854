"""The kernel of `quantize_4bit`: scales and packed codes in one pass over the weight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from q4jax.core import codebooks
from q4jax.core.arithmetic import divide
from q4jax.core.blockwise import LARGEST_RECIPROCAL
from q4jax.core.spec import QuantSpec
from q4jax.gpu import ptx_decode as decode
from q4jax.gpu.requirements import triton
from q4jax.pallas import inline_ptx as ptx
from q4jax.pallas.launch import launch, load, rows_inside

_TILE_WEIGHTS = 4096
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)
_LARGEST_SUBNORMAL = float(np.nextafter(np.finfo(np.float32).smallest_normal, np.float32(0)))


def quantize(w: Array, *, spec: QuantSpec, interpret: bool) -> tuple[Array, Array]:
    """Codes uint8 [blocks, blocksize / 2] and plain scales float32 [blocks].

    The kernel writes codes as words of eight: Pallas addresses an array of bytes by signed numbers
    of 32 bits up to 4 GiB.
    """
    size = spec.blocksize
    blocks = w.size // size
    rows = max(1, _TILE_WEIGHTS // size)
    words, absmax = launch(
        "quantize",
        functools.partial(_kernel, rows=rows, quant_type=spec.quant_type),
        {"w": w.reshape(blocks, size)},
        (
            jax.ShapeDtypeStruct((blocks, size // 8), jnp.int32),
            jax.ShapeDtypeStruct((blocks,), jnp.float32),
        ),
        (pl.cdiv(blocks, rows),),
        interpret=interpret,
    )
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(blocks, size // 2), absmax


def _kernel(
    named: dict[str, Any], words_ref: Any, absmax_ref: Any, *, rows: int, quant_type: str
) -> None:
    blocks, size = named["w"].shape
    first = pl.program_id(0) * rows
    tile = (pl.ds(first, rows), pl.ds(0, size))
    w = load(named["w"].at[tile], rows_inside((rows, size), first, blocks)).astype(jnp.float32)
    scaled, absmax = _scale(w)
    words = _pack(_encode(scaled, quant_type))
    where = (pl.ds(first, rows), pl.ds(0, size // 8))
    triton().store(words_ref.at[where], words, mask=rows_inside(words.shape, first, blocks))
    triton().store(
        absmax_ref.at[pl.ds(first, rows)], absmax, mask=rows_inside((rows,), first, blocks)
    )


def _pack(codes: Array) -> Array:
    """Int32 [rows, size] -> [rows, size / 8]: the first code is the high nibble of the low byte."""
    for shift_even, shift_odd in ((4, 0), (0, 8), (0, 16)):
        even, odd = jnp.unstack(codes.reshape(codes.shape[0], -1, 2), axis=-1)
        codes = (even << shift_even) | (odd << shift_odd)
    return codes


def _scale(w: Array) -> tuple[Array, Array]:
    """[rows, size] -> the same divided by the largest magnitude of a row, and that, [rows].

    As `blockwise.quantize_flat` does it: magnitudes order as integers, NaN last; subnormal numbers
    count as zero; a row is multiplied by a reciprocal, unless that would be subnormal.
    """
    magnitude = lax.bitcast_convert_type(w, jnp.int32) & 0x7FFFFFFF
    absmax = lax.bitcast_convert_type(magnitude.max(1), jnp.float32)
    w = jnp.where(magnitude < 0x00800000, 0.0, w)
    reciprocal = ptx.inline_asm(
        decode.RECIPROCAL_ASM, lambda x: divide(jnp.ones_like(x), x), [absmax], jnp.float32
    )
    reciprocal = jnp.where(absmax < _SMALLEST_NORMAL, 0.0, reciprocal)
    scaled = w * reciprocal[:, None]

    def quotient() -> Array:
        wide = jnp.broadcast_to(absmax[:, None], w.shape)
        exact = ptx.inline_asm(decode.DIVIDE_ASM, divide, [w, wide], jnp.float32)
        return jnp.where(wide > LARGEST_RECIPROCAL, exact, scaled)

    large = (absmax > LARGEST_RECIPROCAL).astype(jnp.int32)  # a float's max may drop or keep NaN
    return lax.cond(large.max() > 0, quotient, lambda: scaled), absmax


def _encode(scaled: Array, quant_type: str) -> Array:
    """The code of each value in [-1, 1], int32: a binary search, in which NaN counts as large."""
    thresholds = [float(t) for t in codebooks.CODEBOOKS[quant_type].thresholds]
    # A product that is a subnormal number counts as zero.
    thresholds = [_LARGEST_SUBNORMAL if t == 0 else t for t in thresholds]
    bits: list[Array] = []
    for level in range(4):
        # After `level` comparisons 2^level thresholds are left, one of which is to be compared.
        step = 8 >> level
        left: list[Any] = thresholds[step - 1 :: 2 * step]
        for bit in reversed(bits):
            left = [jnp.where(bit, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
        bits.append(~(scaled <= left[0]))
    index = jnp.zeros(scaled.shape, jnp.int32)
    for bit in bits:
        index = 2 * index + bit.astype(jnp.int32)
    order = codebooks.CODEBOOKS[quant_type].sorted_codes
    if (order == np.arange(16)).all():
        return index
    # The 16 codes are digits of two integers.
    low, high = (
        np.uint32(sum(int(c) << (4 * i) for i, c in enumerate(order[h : h + 8]))).view(np.int32)
        for h in (0, 8)
    )
    digits = jnp.where(index < 8, low, high)
    return lax.shift_right_logical(digits, 4 * (index & 7)) & 15
