"""Blockwise quantization in plain XLA, a tile of rows at a time: for CPU, in the row layout."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import codebooks
from q4jax.core.blockwise import LARGEST_RECIPROCAL
from q4jax.xla.tiling import fold

_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
_TILE_ROWS = 128


def _absmax(blocks: Array) -> Array:
    """[..., blocksize] -> [...], as an integer maximum, in which NaN is the largest.

    Halving keeps every step a vector operation; a reduction would be scalar.
    """
    bits = lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    while bits.shape[-1] > 1:
        half = bits.shape[-1] // 2
        bits = jnp.maximum(bits[..., :half], bits[..., half:])
    return lax.bitcast_convert_type(bits[..., 0], jnp.float32)


def _select(values: list[Any], bits: list[Array]) -> Any:
    """Pick the entry of `values` whose index has these bits, most significant first."""
    for bit in reversed(bits):
        values = [jnp.where(bit, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _encode(scaled: Array, quant_type: str) -> Array:
    """[R, K] in [-1, 1] -> packed uint8 [R, K/2]."""
    thresholds = list(codebooks.CODEBOOKS[quant_type].thresholds)
    above: list[Array] = []
    interval = jnp.zeros(scaled.shape, jnp.int32)
    for half in (8, 4, 2, 1):
        pivot = _select(thresholds[half - 1 :: 2 * half], above)
        # Not ">": NaN is to pass every threshold.
        above.append(~(scaled <= pivot))
        interval += jnp.where(above[-1], half, 0)
    # As 16-bit pairs: strided slices of bytes would not be vectorized.
    codes = lax.optimization_barrier(interval.astype(jnp.uint8)).reshape(len(scaled), -1, 2)
    pairs = lax.bitcast_convert_type(codes, jnp.uint16)  # odd element << 8 | even element
    packed = (pairs << 4 | pairs >> 8).astype(jnp.uint8)
    if quant_type == "nf4":
        return packed  # its codes are in order of value
    order = codebooks.CODEBOOKS[quant_type].sorted_codes
    renamed = jnp.asarray((order[:, None] << 4 | order).ravel())  # [256]
    return renamed.at[packed].get(mode="promise_in_bounds")


def _multiply(blocks: Array, absmax: Array) -> Array:
    # A block without a normal number counts as zero; NaN stays.
    return blocks * (1.0 / jnp.where(absmax < _SMALLEST_NORMAL, _SMALLEST_NORMAL, absmax))


def _divide_large(blocks: Array, absmax: Array) -> Array:
    # XLA would turn a division by a broadcast into a product with the reciprocal.
    quotient = blocks / lax.optimization_barrier(jnp.broadcast_to(absmax, blocks.shape))
    return jnp.where(absmax > LARGEST_RECIPROCAL, quotient, _multiply(blocks, absmax))


def quantize_rows(w: Array, *, quant_type: str, blocksize: int) -> tuple[Array, Array]:
    """Return the codes and plain scales of a weight whose rows are whole blocks.

    Args:
      w: [..., in], any float dtype of 16 or 32 bits; blocksize divides in.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale.

    Returns:
      packed: uint8 [..., in/2].
      absmax: float32 [..., in/blocksize].
    """
    lead, k = w.shape[:-1], w.shape[-1]
    flat = w.reshape(-1, k)
    n = flat.shape[0]

    def tile(scale, start, size, out):
        # As bits, and behind a barrier that makes the weight look different in each step: XLA would
        # otherwise convert all of a bfloat16 weight to float32 before the loop.
        same, start = lax.optimization_barrier((flat, start))
        bits = lax.bitcast_convert_type(same, f"uint{8 * w.dtype.itemsize}")
        x = lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, start, size), w.dtype)
        blocks = x.astype(jnp.float32).reshape(size, -1, blocksize)
        absmax = lax.optimization_barrier(_absmax(blocks))  # [R, in/blocksize]
        scaled = scale(blocks, absmax[..., None]).reshape(size, k)
        packed = lax.dynamic_update_slice_in_dim(out[0], _encode(scaled, quant_type), start, 0)
        return packed, lax.dynamic_update_slice_in_dim(out[1], absmax, start, 0)

    def over_tiles(scale, out):
        return fold(n, _TILE_ROWS, functools.partial(tile, scale), out)

    zeros = jnp.zeros((n, k // 2), jnp.uint8), jnp.zeros((n, k // blocksize), jnp.float32)
    out = over_tiles(_multiply, zeros)
    # Once more if there are such blocks. A loop of no steps costs nothing; a cond would copy.
    large = jnp.any(out[1] > LARGEST_RECIPROCAL)
    out = lax.fori_loop(
        0, large.astype(jnp.int32), lambda _, out: over_tiles(_divide_large, out), out
    )
    return out[0].reshape(*lead, k // 2), out[1].reshape(*lead, k // blocksize)
