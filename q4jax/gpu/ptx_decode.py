"""The PTX by which GPU kernels decode 4-bit weights, each piece beside its jax.numpy reference.

It does not depend on a kernel language. A front end needs only a way to run PTX on each element
of int32 and float32 tiles: `inline_ptx.inline_asm` in Pallas, `tl.inline_asm_elementwise` in
Triton.

A block's 16 possible values, scale times codebook in float32 and rounded once to the compute
dtype, are computed once a block: its *table*. A weight then costs a lookup and no arithmetic, and
is exact. A table has 16 entries of 16 bits, kept as bytes in 8 words: words 0 to 3 hold the low
bytes of the entries 4j to 4j + 3, words 4 to 7 the high bytes. `prmt` picks four bytes out of
eight at a time by four selectors of 3 bits, and four packed codes are four such selectors, but
for their top bit, which chooses between two lookups. float32 takes two tables, for the low and
the high 16 bits.

Instructions per weight: 2 prmt and 0.625 to prepare selectors; 16 multiplications, 8 conversions
and 8 prmt for each table. Shifts to the right are written as the high half of a product, because
the ALU pipe, where a shift and a prmt run, is what limits a matvec, and the multipliers are idle.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from q4jax.core import codebooks

TABLE_WORDS = 8
_CONVERT = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}


def table_count(dtype: DTypeLike) -> int:
    """The number of tables for weights of this dtype: one for each 16 bits."""
    return np.dtype(dtype).itemsize // 2


def table_word_asm(quant_type: str, dtype: DTypeLike, part: int, word: int) -> str:
    """PTX: a scale (`$1`, float32) -> a word (`$0`) of its block's table.

    Args:
      quant_type: "nf4" or "fp4".
      dtype: of the weights; float32 has a table (`part`) 0 of low and 1 of high halves.
      part: which table.
      word: 0 to 7.
    """
    first = word % 4 * 4
    codes = codebooks.CODEBOOKS[quant_type].values[first : first + 4].view(np.uint32)
    text = "{ .reg .f32 a, b, c, d; .reg .b32 p, q; "
    for name, code in zip("abcd", codes, strict=True):
        text += f"mul.rn.f32 {name}, $1, 0f{code:08X}; "
    high_byte = word // 4
    name = np.dtype(dtype).name
    if name == "float32":
        byte = 2 * part + high_byte
        pick = f"0x{0x40 + 0x11 * byte:04x}"
        text += f"prmt.b32 p, a, b, {pick}; prmt.b32 q, c, d, {pick}; "
        return text + "prmt.b32 $0, p, q, 0x5410; }"
    convert = _CONVERT[name]
    pick = "0x7531" if high_byte else "0x6420"
    return text + f"{convert} p, b, a; {convert} q, d, c; prmt.b32 $0, p, q, {pick}; }}"


# A code's three bits select, its fourth chooses between two lookups: `s` and `m`.
_SELECTORS = (
    "and.b32 s, $1, 0x77777777; mul.hi.u32 m, $1, 0x80000000; "
    "lop3.b32 m, m, 0x44444444, 0x32103210, 0xEA; "
)
# The same by one instruction of the ALU and two of the multipliers. The factor halves a number
# whose lowest bits are 0, as 0x80000000 does, of which the assembler would make a shift.
_SELECTORS_BY_MULTIPLYING = (
    "and.b32 m, $1, 0x88888888; mad.lo.u32 s, m, 0xFFFFFFFF, $1; "
    "mad.hi.u32 m, m, 0x80000001, 0x32103210; "
)


def pair_asm(byte: int, *, spare_alu: bool = False) -> str:
    """PTX: eight codes (`$1`) and a table (`$2` to `$9`) -> entries of one byte's two codes.

    The result (`$0`) has the entry of the byte's high nibble, the earlier weight, in its low half:
    the order of weights in memory.

    Args:
      byte: 0 to 3, which byte of the word.
      spare_alu: with an eighth of an ALU instruction less a weight, and more on the multipliers.
    """
    text = "{ .reg .b32 s, m, p, q, l, h; "
    text += _SELECTORS_BY_MULTIPLYING if spare_alu else _SELECTORS
    if byte >= 2:
        text += "mul.hi.u32 s, s, 0x10000; mul.hi.u32 m, m, 0x10000; "
    for plane, (a, b, c, d) in {"l": (2, 3, 4, 5), "h": (6, 7, 8, 9)}.items():
        text += f"prmt.b32 p, ${a}, ${b}, s; prmt.b32 q, ${c}, ${d}, s; prmt.b32 {plane}, p, q, m; "
    return text + f"prmt.b32 $0, l, h, {'0x6273' if byte % 2 else '0x4051'}; }}"


SCALE_ASM = "{ .reg .f32 t; mul.rn.f32 t, $1, $2; add.rn.f32 $0, t, $3; }"
"""PTX: an entry of the 8-bit map, its nested scale, the offset -> a scale, rounded twice. Its
reference is `blockwise.scale`."""

RECIPROCAL_ASM = "rcp.rn.f32 $0, $1;"
"""PTX: 1 / x, rounded correctly, as Triton's own division is not."""

DIVIDE_ASM = "div.rn.f32 $0, $1, $2;"
"""PTX: x / y, rounded correctly; its reference is `arithmetic.divide`."""


def table_word(scale: Array, quant_type: str, dtype: DTypeLike, part: int, word: int) -> Array:
    """The reference of `table_word_asm`: int32 like `scale`."""
    values = codebooks.CODEBOOKS[quant_type].values[word % 4 * 4 :][:4]
    entries = scale[..., None] * values.reshape(*(1,) * scale.ndim, 4)
    entries = lax.bitcast_convert_type(entries.astype(dtype), jnp.uint8)  # [..., 4, itemsize]
    return lax.bitcast_convert_type(entries[..., 2 * part + word // 4], jnp.int32)


def pair(byte: int, codes: Array, *table: Array) -> Array:
    """The reference of `pair_asm`: int32 like `codes`."""
    entries = lax.bitcast_convert_type(jnp.stack(table, -1), jnp.uint8)  # [..., 8, 4]
    low, high = jnp.unstack(entries.reshape(*codes.shape, 2, 16), axis=-2)
    nibbles = np.array([8 * byte + 4, 8 * byte], np.int32).reshape(*(1,) * codes.ndim, 2)
    index = (codes[..., None] >> nibbles) & 15
    pick = functools.partial(jnp.take_along_axis, axis=-1, mode="promise_in_bounds")
    both = jnp.stack([pick(low, index), pick(high, index)], -1)
    return lax.bitcast_convert_type(both.reshape(*codes.shape, 4), jnp.int32)
