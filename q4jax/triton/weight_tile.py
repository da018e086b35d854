"""A 4-bit weight inside a Triton kernel: loaded, masked and decoded, as in the Pallas kernels.

`PLAN` is a `constants.KernelConstants`.
"""

import triton
import triton.language as tl

from q4jax.core import codebooks
from q4jax.gpu import ptx_decode as decode
from q4jax.gpu.tiling import HALF as HALF_WIDTH

SCALE_ASM = tl.constexpr(decode.SCALE_ASM)
TABLE_WORDS = tl.constexpr(decode.TABLE_WORDS)
WIDTH = tl.constexpr(HALF_WIDTH)
NESTED_BLOCKSIZE = tl.constexpr(codebooks.NESTED_BLOCKSIZE)


@triton.constexpr_function
def table_word_asm(plan, part, word):
    """`KernelConstants.table_word_asm`."""
    return plan.table_word_asm(part, word)


@triton.constexpr_function
def pair_asm(plan, byte):
    """`KernelConstants.pair_asm`."""
    return plan.pair_asm(byte)


@triton.constexpr_function
def stride(plan, name):
    """`KernelConstants.stride`."""
    return plan.stride(name)


@triton.jit
def load(pointers, mask, CACHE: tl.constexpr = ""):
    """Load from pointers; 0 where masked. `CACHE` ".ca" is `cached` of the Pallas kernels."""
    if mask is None:
        values = tl.load(pointers, cache_modifier=CACHE)
    else:
        values = tl.load(pointers, mask=mask, other=0, cache_modifier=CACHE)
    return values


@triton.jit
def below(index, limit, MATTERS: tl.constexpr, mask):
    """`mask` and, where it matters, `index < limit`."""
    if MATTERS:
        inside = index < limit
        mask = inside if mask is None else mask & inside
    return mask


@triton.jit
def first_row(number, SIZE: tl.constexpr, rows):
    """Return the first row of the tile with this number.

    The last one ends with the rows, and shares some with the one before it: both programs store
    the same values there. Only rows that are fewer than a tile's are masked.
    """
    return tl.minimum(number * SIZE, tl.maximum(rows - SIZE, 0))


@triton.jit
def load_scales(absmax, nested, offset, dynamic_map, row, tile, PLAN: tl.constexpr):
    """Float32 [rows, scales] of a tile, decoded where they are double-quantized.

    `offset` is a value. Scales outside the weight are 0 if plain, finite if nested.
    """
    T: tl.constexpr = PLAN.tiling
    blocks: tl.constexpr = T.shape[1] // T.spec.blocksize
    rows = row + tl.arange(0, T.rows)[:, None]
    column = tile * T.scales
    if T.columns < T.spec.blocksize:
        column = tile // (T.spec.blocksize // T.columns)
    columns = column + tl.arange(0, T.scales)[None, :]
    mask = below(rows, T.shape[0], PLAN.masked_n, below(columns, blocks, PLAN.masked_k, None))
    index = rows * blocks + columns
    scales = load(absmax + index, mask)
    if nested is not None:
        value = tl.load(dynamic_map + scales.to(tl.int32))
        nested_scale = load(nested + index.to(tl.uint32) // NESTED_BLOCKSIZE, mask)
        scales = tl.inline_asm_elementwise(
            SCALE_ASM,
            "=f,f,f,f",
            [value, nested_scale, offset],
            tl.float32,
            is_pure=True,
            pack=1,
        )
    return scales


@triton.jit
def one_table(scales, PART: tl.constexpr, PLAN: tl.constexpr):
    """The words of one of the tables of blocks with these scales, each [rows, units, 4]."""
    T: tl.constexpr = PLAN.tiling
    words = ()
    for word in tl.static_range(TABLE_WORDS):
        narrow = tl.inline_asm_elementwise(
            table_word_asm(PLAN, PART, word), "=r,f", [scales], tl.int32, is_pure=True, pack=1
        )
        wide = tl.broadcast_to(narrow[:, :, None], (T.rows, T.scales, 4 * T.units // T.scales))
        words += (tl.reshape(wide, (T.rows, T.units, 4)),)
    return words


@triton.jit
def decode_tables(absmax, nested, offset, dynamic_map, row, tile, PLAN: tl.constexpr):
    """The tables of a tile's blocks, one for each 16 bits of a weight."""
    scales = load_scales(absmax, nested, offset, dynamic_map, row, tile, PLAN)
    tables = (one_table(scales, 0, PLAN),)
    if PLAN.tables == 2:
        tables += (one_table(scales, 1, PLAN),)
    return tables


@triton.jit
def load_words(packed, row, tile, HALF: tl.constexpr, PLAN: tl.constexpr):
    """Int32 [rows, units, 4]: the codes of a half of a tile, 8 a word, 0 outside the weight."""
    T: tl.constexpr = PLAN.tiling
    width: tl.constexpr = T.shape[1] // 8
    rows = tl.arange(0, T.rows)[:, None, None]
    units = tile * T.units + tl.arange(0, T.units)[None, :, None]
    lanes = 4 * HALF + tl.arange(0, 4)[None, None, :]
    words = packed.to(tl.pointer_type(tl.int32), bitcast=True) + row.to(tl.int64) * width
    mask = below(units, T.shape[1] // T.unit, PLAN.masked_k, None)
    mask = below(row + rows, T.shape[0], PLAN.masked_n, mask)
    cache: tl.constexpr = ".ca" if T.halves > 1 else ""
    return load(words + (rows * width + units * (T.unit // 8) + lanes), mask, cache)


@triton.jit
def pairs(words, t, PLAN: tl.constexpr):
    """16 bits of each of 8 codes a word: int32 [rows, units, 4, 2, 2], two weights each.

    `t` is a table.
    """
    entries = ()
    for byte in tl.static_range(4):
        one = tl.inline_asm_elementwise(
            pair_asm(PLAN, byte),
            "=r,r,r,r,r,r,r,r,r,r",
            [words, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]],
            tl.int32,
            is_pure=True,
            pack=1,
        )
        entries += (one,)
    return tl.join(tl.join(entries[0], entries[2]), tl.join(entries[1], entries[3]))


@triton.jit
def decode_half(words, tables, DTYPE: tl.constexpr, PLAN: tl.constexpr):
    """Words of codes -> `DTYPE` [rows, units * 32], the weights in their order."""
    T: tl.constexpr = PLAN.tiling
    low = pairs(words, tables[0], PLAN)
    if PLAN.tables == 1:
        first = low.to(tl.int16).to(DTYPE, bitcast=True)
        second = (low >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        high = pairs(words, tables[1], PLAN)
        first = ((high << 16) | (low & 0xFFFF)).to(DTYPE, bitcast=True)
        second = ((high & -0x10000) | ((low >> 16) & 0xFFFF)).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(first, second), (T.rows, T.units * WIDTH))


@triton.jit
def half_columns(tile, HALF: tl.constexpr, PLAN: tl.constexpr):
    """Int32 [1, units * 32]: the columns of the weight in a half of a tile."""
    T: tl.constexpr = PLAN.tiling
    columns = tl.arange(0, T.units * WIDTH)[None, :]
    return (tile * T.units + columns // WIDTH) * T.unit + HALF * WIDTH + columns % WIDTH
