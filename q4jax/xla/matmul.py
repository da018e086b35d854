"""The 4-bit operations in plain XLA, one tile of weight rows at a time: what runs on CPU.

Row layout only: `in % blocksize == 0`, packed codes [out, in/2], scales [out, in/blocksize].

A weight is never whole in memory. A tile is decoded by looking up one byte, two elements, at a
time: the decoded pair lands in its place, so no nibbles are interleaved, and the lookup is one
64-bit load. The tile then goes through one dot while it is still in cache.
"""

import functools
import importlib.resources
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import codebooks
from q4jax.core.blockwise import LARGEST_RECIPROCAL

_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
_QUANTIZE_ROWS = 128


@functools.cache
def _table() -> dict[str, dict[str, list[list[int]]]]:
    """op -> dtype -> [[largest M, elements a tile, 1 to compute in float32], ...], M ascending."""
    return json.loads(importlib.resources.files("q4jax").joinpath("xla", "tuning.json").read_text())


@functools.cache
def has_bfloat16_dot() -> bool:
    """Whether this CPU multiplies bfloat16 itself; elsewhere float32 dots are faster."""
    try:
        with open("/proc/cpuinfo") as info:
            return "avx512_bf16" in info.read()
    except OSError:
        return False


def choose(op: str, m: int, dtype: Any) -> tuple[int, bool]:
    """(elements a tile, whether to convert operands to float32 before the dot), from the table.

    Args:
      op: "linear" or "transposed".
      m: rows of the activation.
      dtype: the activation's.
    """
    name = jnp.dtype(dtype).name
    if name == "bfloat16":
        name += "_native" if has_bfloat16_dot() else "_emulated"
    rows_of = _table()[op][name]
    _, elements, upcast = next((row for row in rows_of if m <= row[0]), rows_of[-1])
    return elements, bool(upcast)


def _fold(n: int, size: int, tile: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """`carry = tile(start, size, carry)` over [0, n): the odd rest first, then full tiles."""
    rest = n % size
    if rest:
        carry = tile(0, rest, carry)
    if n - rest == size:
        return tile(rest, size, carry)
    if n < size:
        return carry

    def body(i, carry):
        # Some XLA versions take any loop without library calls for a small one and run it on a
        # single thread. A sort of two numbers, in effect a no-op, is such a call.
        i = lax.sort(jnp.stack([i, i]))[0]
        return tile(rest + i * size, size, carry)

    return lax.fori_loop(0, n // size, body, carry)


def _pairs(quant_type: str) -> Array:
    """What each byte decodes to, [256, 2]."""
    code = codebooks.CODEBOOKS[quant_type].values
    return jnp.asarray(np.stack([np.repeat(code, 16), np.tile(code, 16)], axis=1))


def decode(packed: Array, absmax: Array, *, quant_type: str, dtype: Any) -> Array:
    """[R, K/2] and [R, K/blocksize] to [R, K], rounded once to dtype."""
    values = _pairs(quant_type).at[packed].get(mode="promise_in_bounds")  # [R, K/2, 2]
    blocks = values.reshape(*absmax.shape, -1) * absmax[..., None]
    return blocks.reshape(packed.shape[0], -1).astype(dtype)


def _as_bits(x: Array) -> Array:
    """16-bit floats as integers: XLA's CPU backend takes a slice of all in float32 instead."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _as_float(bits: Array, dtype: Any) -> Array:
    return lax.bitcast_convert_type(bits, dtype) if dtype.itemsize == 2 else bits


def _column_tile(columns: int, blocksize: int) -> int:
    """At most so many columns, such that a tile is whole blocks or lies in one."""
    if columns >= blocksize:
        return columns - columns % blocksize
    return 1 << max(columns.bit_length() - 1, 4)


def _product(
    x: Array,
    packed: Array,
    absmax: Array,
    bias: Array | None,
    *,
    quant_type: str,
    blocksize: int,
    transpose: bool,
    elements: int | None,
    upcast: bool | None,
) -> Array:
    """x @ W.T + bias, or x @ W where `transpose`, in x's dtype.

    A tile of the result is the sum over chunks of the contraction. There is one chunk, unless
    operands are converted, where a chunk bounds the converted part of x too, or the result of
    `transpose` is small, where adding to all of it is faster than tiles of a few columns.
    """
    m, n, k = x.shape[0], packed.shape[0], packed.shape[1] * 2
    table_elements, table_upcast = choose("transposed" if transpose else "linear", m, x.dtype)
    elements = elements or table_elements
    dot_dtype = jnp.float32 if (table_upcast if upcast is None else upcast) else x.dtype
    contraction, outputs = (n, k) if transpose else (k, n)
    if transpose and 2 * m * k <= elements:
        size, chunk = k, max(elements // k // 16 * 16, 16)
    elif dot_dtype != x.dtype and m * contraction > elements:
        chunk = max(elements // m, 16)
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

    x_bits = _as_bits(x)

    def weight(row, rows, column, columns):
        codes = lax.dynamic_slice(packed, (row, column // 2), (rows, columns // 2))
        block, blocks = column // blocksize, max(columns // blocksize, 1)
        scales = lax.dynamic_slice(absmax, (row, block), (rows, blocks))
        w = decode(codes, scales, quant_type=quant_type, dtype=x.dtype)
        return w.astype(dot_dtype)

    def tile(start, size, y):
        def add(at, chunk, total):
            # The barrier keeps XLA from converting all of x before the loop.
            xs = lax.optimization_barrier(lax.dynamic_slice_in_dim(x_bits, at, chunk, 1))
            xs = _as_float(xs, x.dtype).astype(dot_dtype)
            w = weight(at, chunk, start, size) if transpose else weight(start, size, at, chunk)
            form = "mc,cs->ms" if transpose else "mc,sc->ms"
            part = jnp.einsum(form, xs, w, preferred_element_type=jnp.float32)
            return part if total is None else total + part

        zero = None if chunk == contraction else jnp.zeros((m, size), jnp.float32)
        total = _fold(contraction, chunk, add, zero)  # [M, size]
        if bias is not None:
            total += lax.dynamic_slice_in_dim(bias, start, size).astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(y, _as_bits(total.astype(x.dtype)), start, 1)

    y = _fold(outputs, size, tile, jnp.zeros((m, outputs), x_bits.dtype))
    return _as_float(y, x.dtype)


def linear(
    x: Array,
    packed: Array,
    absmax: Array,
    bias: Array | None = None,
    *,
    quant_type: str,
    blocksize: int,
    elements: int | None = None,
    upcast: bool | None = None,
) -> Array:
    """x @ W.T + bias, accumulated in float32 and rounded once.

    Args:
      x: [M, K].
      packed: uint8 [N, K/2].
      absmax: float32 [N, K/blocksize].
      bias: [N], or None.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; divides K.
      elements: elements of the weight that are decoded at a time; None takes the table's.
      upcast: whether the dot's operands, rounded to x's dtype, are converted to float32, which
        changes no product; None takes the table's.

    Returns:
      [M, N] in x's dtype.
    """
    return _product(
        x,
        packed,
        absmax,
        bias,
        quant_type=quant_type,
        blocksize=blocksize,
        transpose=False,
        elements=elements,
        upcast=upcast,
    )


def transposed(
    g: Array,
    packed: Array,
    absmax: Array,
    *,
    quant_type: str,
    blocksize: int,
    elements: int | None = None,
    upcast: bool | None = None,
) -> Array:
    """g @ W, accumulated in float32 and rounded once: `linear`'s gradient with respect to x.

    Args:
      g: [M, N].
      packed: uint8 [N, K/2].
      absmax: float32 [N, K/blocksize].
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; divides K.
      elements: as for `linear`.
      upcast: as for `linear`.

    Returns:
      [M, K] in g's dtype.
    """
    return _product(
        g,
        packed,
        absmax,
        None,
        quant_type=quant_type,
        blocksize=blocksize,
        transpose=True,
        elements=elements,
        upcast=upcast,
    )


def _absmax(blocks: Array) -> Array:
    """[..., blocksize] -> [...], as an integer maximum, which NaN wins (a float one drops it).

    Halving keeps every step a vector operation; a reduction would be scalar.
    """
    bits = lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    while bits.shape[-1] > 1:
        half = bits.shape[-1] // 2
        bits = jnp.maximum(bits[..., :half], bits[..., half:])
    return lax.bitcast_convert_type(bits[..., 0], jnp.float32)


def _select(values: list[Any], bits: list[Array]) -> Any:
    """The entry of `values` that bits, most significant first, number."""
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
    """Codes and plain scales of a weight whose rows are whole blocks.

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

    def fold(scale, out):
        return _fold(n, _QUANTIZE_ROWS, functools.partial(tile, scale), out)

    zeros = jnp.zeros((n, k // 2), jnp.uint8), jnp.zeros((n, k // blocksize), jnp.float32)
    out = fold(_multiply, zeros)
    # Once more if there are such blocks. A loop of no steps costs nothing; a cond would copy.
    large = jnp.any(out[1] > LARGEST_RECIPROCAL)
    out = lax.fori_loop(0, large.astype(jnp.int32), lambda _, out: fold(_divide_large, out), out)
    return out[0].reshape(*lead, k // 2), out[1].reshape(*lead, k // blocksize)
