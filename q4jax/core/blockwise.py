"""The reference of blockwise quantization, in plain jax.numpy, for every implementation.

Functions take and return arrays and a `QuantSpec`; `QuantState` and `Params4bit` are built on
them. The arithmetic is that of bitsandbytes' CPU backend, bit for bit, except that XLA flushes
subnormals to zero.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec

# Above this, 1 / absmax is subnormal, which XLA flushes to zero.
LARGEST_RECIPROCAL = 2.0**126


class WeightArrays(NamedTuple):
    """The arrays of a quantized weight; the last two are None where the scales are plain."""

    packed: Array
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None


def block_absmax(blocks: Array) -> Array:
    """Return the largest magnitude along the last axis, float32; NaN where there is a NaN.

    XLA's float max drops NaN on CPU. Without their sign bit, floats order as integers do, NaN last.
    """
    bits = lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(bits.max(-1), jnp.float32)


def divide(x: Array, by: Array) -> Array:
    """Divide as IEEE 754 says, also by a broadcast denominator.

    XLA turns a division by a broadcast into a product with the reciprocal, unless it cannot see
    that it is one.
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(by, x.shape))


def _scale_blocks(flat: Array, blocksize: int) -> tuple[Array, Array]:
    """Scale blocks to [-1, 1]; return them and their absmax. The last block is padded with 0.

    Full blocks are multiplied by the reciprocal and a partial one is divided, which differ in the
    last bit now and then: that is how the files that exist were made.
    """
    count = -(-flat.size // blocksize)
    blocks = jnp.pad(flat, (0, count * blocksize - flat.size)).reshape(count, blocksize)
    absmax = block_absmax(blocks)
    column = absmax[:, None]
    # A subnormal absmax is zero to XLA's arithmetic: such a block is a zero block.
    scaled = blocks * jnp.where(column == 0, 0, 1.0 / column)
    by_division = column > LARGEST_RECIPROCAL
    if flat.size % blocksize:
        by_division |= (jnp.arange(count) == count - 1)[:, None] & (column > 0)
    return jnp.where(by_division, divide(blocks, column), scaled), absmax


def _interval(scaled: Array, thresholds: np.ndarray) -> Array:
    """Count the thresholds below each value, int32; all of them for NaN."""
    return jnp.searchsorted(jnp.asarray(thresholds), scaled, side="left")


def _sum(flat: Array) -> Array:
    """Sum by halving: the same bits under `jit`, under `vmap` and eagerly, unlike `jnp.sum`."""
    while flat.size > 1:
        flat = jnp.pad(flat, (0, flat.size % 2))
        half = flat.size // 2
        flat = flat[:half] + flat[half:]
    return flat[0]


def double_quantize(absmax: Array) -> tuple[Array, Array, Array]:
    """Quantize scales to (uint8 codes like absmax, float32 nested_absmax [b], offset [])."""
    # The mean by a true division: a divisor that does not depend on data would become a product
    # with the reciprocal, and that be contracted into the subtraction.
    total = _sum(absmax.ravel())
    offset = total / jnp.where(jnp.isnan(total), 1.0, jnp.float32(absmax.size))
    scaled, nested_absmax = _scale_blocks((absmax - offset).ravel(), codebooks.NESTED_BLOCKSIZE)
    codes = _interval(scaled, codebooks.DYNAMIC_THRESHOLDS).astype(jnp.uint8)
    # Any code decodes to the offset in a block without spread; bitsandbytes writes 0.
    codes = jnp.where(nested_absmax[:, None] == 0, 0, codes)
    return codes.ravel()[: absmax.size].reshape(absmax.shape), nested_absmax, offset


def pack(codes: Array) -> Array:
    """Pack two 4-bit codes a byte, the element of even index in the high nibble; n must be even."""
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def unpack(packed: Array) -> Array:
    """The inverse of `pack`."""
    pairs = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return pairs.reshape(*packed.shape[:-1], -1)


def quantize_flat(w: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """Quantize a weight to flat codes and plain scales: (uint8 [(n+1)//2], float32 [blocks])."""
    flat = w.astype(jnp.float32).ravel()
    scaled, absmax = _scale_blocks(flat, spec.blocksize)
    interval = _interval(scaled, codebooks.CODEBOOKS[spec.quant_type].thresholds)
    codes = jnp.asarray(codebooks.CODEBOOKS[spec.quant_type].sorted_codes)[interval]
    even = flat.size + flat.size % 2
    codes = codes.ravel()[:even]
    if flat.size % 2:
        zero = codebooks.CODEBOOKS[spec.quant_type].sorted_codes[7]
        codes = codes.at[-1].set(zero)
    return pack(codes), absmax


def in_layout(
    w_shape: tuple[int, ...], packed: Array, absmax: Array, spec: QuantSpec
) -> tuple[Array, Array]:
    """Reshape codes and scales to the spec's layout, keeping the leading axes of `w_shape`."""
    lead = w_shape[: len(w_shape) - len(spec.shape)]
    return packed.reshape(*lead, *spec.packed_shape), absmax.reshape(*lead, *spec.absmax_shape)


def decode_absmax(absmax: Array, nested_absmax: Array | None, offset: Array | None) -> Array:
    """Decode scales to float32, in `absmax`'s shape; `offset`'s axes are leading axes of all."""
    if nested_absmax is None or offset is None:
        return absmax
    if offset.ndim:
        return jax.vmap(decode_absmax)(absmax, nested_absmax, offset)
    return decode_absmax_at(block_numbers(absmax.shape), absmax, nested_absmax, offset)


def block_numbers(
    shape: tuple[int, ...],
    first: Sequence[Array | int] | None = None,
    whole: tuple[int, ...] | None = None,
) -> Array:
    """Number scales in the row-major order of their weight, int32 of `shape`.

    From an iota rather than a reshape: a reshape across a sharded axis would gather the scales.

    Args:
      shape: of the scales.
      first: the indices of the first of them, where they are a part of the weight's.
      whole: the shape of all the weight's scales.
    """
    first, whole = first or (0,) * len(shape), whole or shape
    numbers = jnp.zeros(shape, jnp.int32)
    for axis, (start, size) in enumerate(zip(first, whole, strict=True)):
        numbers = numbers * size + start + lax.broadcasted_iota(jnp.int32, shape, axis)
    return numbers


def decode_absmax_at(index: Array, codes: Array, nested_absmax: Array, offset: Array) -> Array:
    """Decode 8-bit codes to float32 scales; `index` holds the numbers of their blocks."""
    scales = nested_absmax[index // codebooks.NESTED_BLOCKSIZE]
    return scale(jnp.asarray(codebooks.DYNAMIC_MAP)[codes], scales, offset)


def scale(value: Array, nested: Array, offset: Array) -> Array:
    """Multiply an entry of the 8-bit map by its nested scale and add the offset: two roundings.

    A compiler would contract the product into the sum. No entry of the map exceeds 1, so the clip
    changes nothing, which the compiler cannot know.
    """
    return jnp.clip(value * nested, -nested, nested) + offset


def dequantize(arrays: WeightArrays, spec: QuantSpec, dtype: DTypeLike) -> Array:
    """Compute codebook * absmax in float32, rounded once to `dtype`; leading axes are kept."""
    packed = arrays.packed
    absmax = decode_absmax(arrays.absmax, arrays.nested_absmax, arrays.offset)
    lead = packed.shape[: packed.ndim - len(spec.packed_shape)]
    values = jnp.asarray(codebooks.CODEBOOKS[spec.quant_type].values)[unpack(packed)]
    if spec.in_rows:
        blocks = values.reshape(*absmax.shape, spec.blocksize)
        weight = blocks * absmax[..., None]
    else:
        size = math.prod(spec.shape)
        weight = values[..., :size] * jnp.repeat(absmax, spec.blocksize, axis=-1)[..., :size]
    return weight.astype(dtype).reshape(*lead, *spec.shape)


def take_rows(arrays: WeightArrays, ids: Array, spec: QuantSpec, dtype: DTypeLike) -> Array:
    """Decode only the rows with these ids of a table `[rows, features]`: `[*ids.shape, features]`.

    `ids` are within the table.
    """
    features = spec.shape[1]
    ids = ids[..., None]
    # Whole rows of codes where rows hold whole blocks, else element by element.
    if spec.in_rows:
        nibbles = unpack(arrays.packed[ids[..., 0]])
        blocks = features // spec.blocksize
        scales = _scales_at(ids * blocks + jnp.arange(blocks), arrays)
        scales = jnp.repeat(scales, spec.blocksize, axis=-1)
    else:
        byte, odd = divide_position(ids, features, 2)
        pair = arrays.packed[byte]
        nibbles = jnp.where(odd == 0, pair >> 4, pair & 15)
        scales = _scales_at(divide_position(ids, features, spec.blocksize)[0], arrays)
    return (jnp.asarray(codebooks.CODEBOOKS[spec.quant_type].values)[nibbles] * scales).astype(
        dtype
    )


def divide_position(row: Array, columns: int, by: int) -> tuple[Array, Array]:
    """Divide the row-major positions of all columns of a row; return quotients and remainders.

    The positions of a large table exceed int32, which the quotients do not.
    """
    above, rest = row // by, row % by
    position = rest * columns + jnp.arange(columns)
    return above * columns + position // by, position % by


def _scales_at(block: Array, arrays: WeightArrays) -> Array:
    """Decode the float32 scales of the blocks with these numbers."""
    scales = arrays.absmax.reshape(-1)[block]
    if arrays.nested_absmax is None or arrays.offset is None:
        return scales
    return decode_absmax_at(block, scales, arrays.nested_absmax, arrays.offset)
