"""A 4-bit weight inside a kernel: how its arrays are viewed, loaded, masked and decoded."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from q4jax.core import blockwise, codebooks
from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays
from q4jax.gpu import ptx_decode as decode
from q4jax.gpu.tiling import HALF, Tiling
from q4jax.pallas import inline_ptx as ptx
from q4jax.pallas.launch import below, load


def operands(weight: WeightArrays | ArraysInStack, tiling: Tiling) -> dict[str, Array]:
    """What a kernel reads of a weight, by name; the views are free.

    words: int32 [N, units of a row, 4 * halves], 8 codes each; absmax [N, blocks of a row]; and
    with double quantization nested [n], offset [1] and the 8-bit map [256].

    Of a weight in a stack: index0 [1] and so on; words, nested, offset and (unless the scales are
    the weight's own) absmax have the stack's axes in front.
    """
    n, k = tiling.shape
    arrays, indices = weight if isinstance(weight, ArraysInStack) else (weight, ())
    lead = arrays.packed.shape[: len(indices)]
    packed = arrays.packed.reshape(*lead, n, k // tiling.unit, 4 * tiling.halves, 4)
    named = {"words": lax.bitcast_convert_type(packed, jnp.int32), "absmax": arrays.absmax}
    named |= {f"index{axis}": index.reshape(1) for axis, index in enumerate(indices)}
    return named | nested_operands(arrays)


def load_indices(refs: dict[str, Any]) -> dict[str, Any]:
    """The operands and the weight's place in its stack, read once, before any loop."""
    sizes = refs["words"].shape[:-3]
    read = (refs[f"index{axis}"][0] for axis in range(len(sizes)))
    place = (jnp.clip(index, 0, size - 1) for index, size in zip(read, sizes, strict=True))
    return refs | {"place": tuple(place)}


def _place(refs: dict[str, Any], name: str, own: int) -> tuple[Array, ...]:
    """Where the weight is in front of an array's `own` axes."""
    return refs["place"] if refs[name].ndim > own else ()


def nested_operands(arrays: WeightArrays) -> dict[str, Array]:
    """The operands that only double quantization has."""
    if arrays.nested_absmax is None or arrays.offset is None:
        return {}
    return {
        "nested": arrays.nested_absmax,
        "offset": arrays.offset.reshape(*arrays.offset.shape, 1),
        "map": jnp.asarray(codebooks.DYNAMIC_MAP),
    }


def load_scales(
    refs: dict[str, Any], where: tuple[Any, ...], index: Array, mask: Array | None
) -> Array:
    """Float32 scales, decoded where they are double-quantized.

    Args:
      refs: the operands.
      where: their place in `absmax`.
      index: int32, which blocks of the weight they are.
      mask: where there are any; the others are 0 in a plain weight, finite in a nested one.
    """
    place = _place(refs, "absmax", len(where))
    scales = load(refs["absmax"].at[(*place, *where)], mask)
    if "nested" not in refs:
        return scales
    nested = load(refs["nested"].at[(*place, index // codebooks.NESTED_BLOCKSIZE)], mask)
    value = load(refs["map"].at[scales.astype(jnp.int32)], None)
    offset = jnp.broadcast_to(refs["offset"][(*place, 0)], value.shape)
    return ptx.inline_asm(decode.SCALE_ASM, blockwise.scale, [value, nested, offset], jnp.float32)


def tables(scales: Array, quant_type: str, dtype: Any) -> list[list[Array]]:
    """The tables of blocks with these scales, a list of words for each 16 bits of a weight."""

    def table_word(part: int, word: int) -> Array:
        static = {"quant_type": quant_type, "dtype": dtype, "part": part, "word": word}
        reference = functools.partial(decode.table_word, **static)
        return ptx.inline_asm(decode.table_word_asm(**static), reference, [scales], jnp.int32)

    parts = range(decode.table_count(dtype))
    return [[table_word(part, word) for word in range(decode.TABLE_WORDS)] for part in parts]


def pairs(words: Array, tables_: list[list[Array]]) -> list[list[Array]]:
    """For each table, 16 bits of each weight, two weights an int32, for the bytes 0 to 3."""

    def pair(byte: int, table: list[Array]) -> Array:
        reference = functools.partial(decode.pair, byte)
        return ptx.inline_asm(decode.pair_asm(byte), reference, [words, *table], jnp.int32)

    return [[pair(byte, table) for byte in range(4)] for table in tables_]


def two_weights(entries: list[Array], dtype: Any) -> tuple[Array, Array]:
    """The weights of a pair, from its 16 bits of each table, low ones first."""
    if len(entries) == 1:
        halves = entries[0].astype(jnp.int16), (entries[0] >> 16).astype(jnp.int16)
        first, second = (lax.bitcast_convert_type(h, dtype) for h in halves)
        return first, second
    low, high = entries
    first = (high << 16) | (low & 0xFFFF)
    second = (high & -0x10000) | lax.shift_right_logical(low, np.int32(16))
    return lax.bitcast_convert_type(first, dtype), lax.bitcast_convert_type(second, dtype)


def decode_words(words: Array, tables_: list[list[Array]], dtype: Any) -> Array:
    """[..., w] words of 8 codes -> [..., w, 2, 2, 2] weights in their order."""
    interleaved = [
        jnp.stack([jnp.stack([b[0], b[2]], -1), jnp.stack([b[1], b[3]], -1)], -1)
        for b in pairs(words, tables_)
    ]  # [..., w, 2, 2] a table: the bytes of a word, in order
    return jnp.stack(two_weights(interleaved, dtype), -1)


def decode_tile(
    refs: dict[str, Any], tiling: Tiling, row: Any, tile: Any, dtype: Any
) -> list[Array]:
    """The halves of a tile, each `dtype` [rows, units * 32].

    What lies outside the weight is finite where the weight is; it meets zeros of the other operand
    or makes results that are not stored.

    Args:
      refs: the operands.
      tiling: the tile's size.
      row: its first row.
      tile: its number in the row.
      dtype: the compute dtype.
    """
    n, k = tiling.shape
    rows, units, columns = tiling.rows, tiling.units, tiling.scales
    blocks = k // tiling.spec.blocksize
    column = tile * tiling.columns // tiling.spec.blocksize
    narrow, shape = (rows, columns), (rows, units, 4)
    scales_inside = words_inside = None
    if not tiling.inside:
        scales_inside = below(narrow, 0, row, n) & below(narrow, 1, column, blocks)
        words_inside = below(shape, 0, row, n) & below(shape, 1, tile * units, k // tiling.unit)
    scales = load_scales(
        refs,
        (pl.ds(row, rows), pl.ds(column, columns)),
        (row + lax.broadcasted_iota(jnp.int32, narrow, 0)) * blocks
        + (column + lax.broadcasted_iota(jnp.int32, narrow, 1)),
        scales_inside,
    )
    wide = [
        [
            jnp.broadcast_to(word[:, :, None], (rows, columns, 4 * units // columns)).reshape(shape)
            for word in table
        ]
        for table in tables(scales, tiling.spec.quant_type, dtype)
    ]
    halves = []
    for half in range(tiling.halves):
        part = (pl.ds(row, rows), pl.ds(tile * units, units), pl.ds(4 * half, 4))
        where = (*_place(refs, "words", len(part)), *part)
        words = load(refs["words"].at[where], words_inside, cached=tiling.halves > 1)
        halves.append(decode_words(words, wide, dtype).reshape(rows, units * HALF))
    return halves


def load_activation(ref: Any, tiling: Tiling, row: Any, rows: int, tile: Any, half: int) -> Array:
    """The columns of x [M, units, unit] that meet half `half` of a tile: [rows, units * 32]."""
    where, mask = activation_part(ref.shape, tiling, row, rows, tile, half)
    return load(ref.at[where], mask).reshape(rows, tiling.units * HALF)


def activation_part(
    shape: tuple[int, ...], tiling: Tiling, row: Any, rows: int, tile: Any, half: int
) -> tuple[tuple[Any, ...], Array | None]:
    """Where that is in an array [M, units, unit], and a mask of what is inside the array."""
    m, units, _ = shape
    first = tile * tiling.units
    where = (pl.ds(row, rows), pl.ds(first, tiling.units), pl.ds(half * HALF, HALF))
    if tiling.inside and m % rows == 0:
        return where, None
    part = (rows, tiling.units, HALF)
    return where, below(part, 0, row, m) & below(part, 1, first, units)
