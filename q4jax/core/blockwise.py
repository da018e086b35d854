"""The reference of blockwise quantization, in plain jax.numpy, for every implementation.

Functions take and return arrays and a `QuantSpec`; `QuantState` and `Params4bit` are built on
them. The arithmetic is that of bitsandbytes' CPU backend, bit for bit, except that XLA flushes
subnormals to zero.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from q4jax.core import codebooks
from q4jax.core.arithmetic import CPU, PORTABLE, Arithmetic
from q4jax.core.spec import QuantSpec

# Above this, 1 / absmax is subnormal, which XLA flushes to zero.
LARGEST_RECIPROCAL = 2.0**126


class WeightArrays(NamedTuple):
    """The arrays of a quantized weight; the last two are None where the scales are plain."""

    packed: Array
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None


def block_absmax(blocks: Array, axis: int = -1) -> Array:
    """Return the largest magnitude along an axis, float32; NaN where there is a NaN.

    XLA's float max drops NaN on CPU. Without their sign bit, floats order as integers do, NaN last.
    """
    bits = lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(bits.max(axis), jnp.float32)


def _scale_blocks(flat: Array, blocksize: int, arithmetic: Arithmetic) -> tuple[Array, Array]:
    """Scale blocks to [-1, 1]; return them and their absmax. The last block is padded with 0.

    Full blocks are multiplied by the reciprocal and a partial one is divided, which differ in the
    last bit now and then: that is how the files that exist were made.
    """
    flush = arithmetic.flush
    count = -(-flat.size // blocksize)
    blocks = jnp.pad(flat, (0, count * blocksize - flat.size)).reshape(count, blocksize)
    absmax = block_absmax(blocks)
    # A subnormal absmax is zero to XLA's arithmetic: such a block is a zero block.
    blocks, column = flush(blocks), flush(absmax[:, None])
    scaled = flush(blocks * jnp.where(column == 0, 0, arithmetic.reciprocal(column)))
    by_division = column > LARGEST_RECIPROCAL
    if flat.size % blocksize:
        by_division |= (jnp.arange(count) == count - 1)[:, None] & (column > 0)
    return jnp.where(by_division, arithmetic.divide(blocks, column), scaled), absmax


def _interval(scaled: Array, thresholds: np.ndarray, search: str) -> Array:
    """Count the thresholds below each value, int32; all of them for NaN."""
    return jnp.searchsorted(jnp.asarray(thresholds), scaled, side="left", method=search)


def _sum(flat: Array, arithmetic: Arithmetic) -> Array:
    """Sum by halving: the same bits under `jit`, under `vmap` and eagerly, unlike `jnp.sum`."""
    while flat.size > 1:
        flat = jnp.pad(flat, (0, flat.size % 2))
        half = flat.size // 2
        flat = arithmetic.flush(flat[:half] + flat[half:])
    return flat[0]


def double_quantize(absmax: Array) -> tuple[Array, Array, Array]:
    """Quantize scales to (uint8 codes like absmax, float32 nested_absmax [b], offset []).

    The same bits on every platform.
    """
    return lax.platform_dependent(
        absmax,
        cpu=functools.partial(double_quantize_by, CPU),
        default=functools.partial(double_quantize_by, PORTABLE),
    )


def double_quantize_by(
    arithmetic: Arithmetic, absmax: Array, search: str = "scan"
) -> tuple[Array, Array, Array]:
    """`double_quantize` by the arithmetic of one platform; `search` is `jnp.searchsorted`'s."""
    absmax = arithmetic.flush(absmax)
    # The mean by a true division: a divisor that does not depend on data would become a product
    # with the reciprocal, and that be contracted into the subtraction.
    total = _sum(absmax.ravel(), arithmetic)
    size = jnp.float32(absmax.size)
    offset = arithmetic.divide(total, jnp.where(jnp.isnan(total), 1.0, size))
    centred = arithmetic.flush(absmax - offset).ravel()
    scaled, nested_absmax = _scale_blocks(centred, codebooks.NESTED_BLOCKSIZE, arithmetic)
    codes = _interval(scaled, codebooks.DYNAMIC_THRESHOLDS, search).astype(jnp.uint8)
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
    """Quantize a weight to flat codes and plain scales: (uint8 [(n+1)//2], float32 [blocks]).

    The same bits on every platform.
    """
    return lax.platform_dependent(
        w,
        cpu=functools.partial(quantize_flat_by, CPU, spec=spec),
        default=functools.partial(quantize_flat_by, PORTABLE, spec=spec),
    )


def quantize_flat_by(
    arithmetic: Arithmetic, w: Array, *, spec: QuantSpec, search: str = "scan"
) -> tuple[Array, Array]:
    """`quantize_flat` by the arithmetic of one platform; `search` is `jnp.searchsorted`'s."""
    flat = w.astype(jnp.float32).ravel()
    scaled, absmax = _scale_blocks(flat, spec.blocksize, arithmetic)
    interval = _interval(scaled, codebooks.CODEBOOKS[spec.quant_type].thresholds, search)
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
    return decode_absmax_by(_decode_nested, absmax, nested_absmax, offset)


def decode_absmax_by(
    one: Callable[[Array, Array, Array], Array],
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
) -> Array:
    """`decode_absmax` by a function for the codes of one weight."""
    if nested_absmax is None or offset is None:
        return absmax
    for _ in range(offset.ndim):
        one = jax.vmap(one)
    return one(absmax, nested_absmax, offset)


def _decode_nested(codes: Array, nested_absmax: Array, offset: Array) -> Array:
    return decode_absmax_at(block_numbers(codes.shape), codes, nested_absmax, offset)


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


def decode_absmax_part(
    codes: Array,
    nested_absmax: Array,
    offset: Array,
    first: Sequence[Array | int],
    whole: tuple[int, ...],
) -> Array:
    """Decode the part of a weight's scales that begins at `first`; `whole` is the shape of all."""
    index = block_numbers(codes.shape, first, whole)
    return decode_absmax_at(index, codes, nested_absmax, offset)


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
        scales = _scales_at(ids * blocks + _columns(ids, blocks), arrays)
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
    position = rest * columns + _columns(row, columns)
    return above * columns + position // by, position % by


def _columns(row: Array, columns: int) -> Array:
    """Number the columns, in the dtype of `row` `[..., 1]` and with as many axes."""
    return jnp.arange(columns, dtype=row.dtype).reshape(*(1,) * (row.ndim - 1), columns)


def _scales_at(block: Array, arrays: WeightArrays) -> Array:
    """Decode the float32 scales of the blocks with these numbers."""
    scales = arrays.absmax.reshape(-1)[block]
    if arrays.nested_absmax is None or arrays.offset is None:
        return scales
    return decode_absmax_at(block, scales, arrays.nested_absmax, arrays.offset)
