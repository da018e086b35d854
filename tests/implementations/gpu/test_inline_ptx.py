"""The PTX emulator against numpy, and the PTX of decoding against its reference."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ptx_emulator import emulate  # notebooks/ is on pytest's path

from q4jax import codebooks
from q4jax.gpu import ptx_decode as decode

SCALES = np.float32([0, 1, 0.0217, 1e-35, 65504, 3e38, np.inf, np.nan, -1])


def run(asm, args, dtype):
    return np.asarray(emulate(asm, [jnp.asarray(a) for a in args], dtype))


def bits(x):
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize])


def test_prmt_by_its_definition():
    rng = np.random.default_rng(0)
    a, b, selector = rng.integers(0, 2**32, (3, 500), np.uint32)
    expected = []
    for x, y, s in zip(a, b, selector, strict=True):
        source = [(int(x) | int(y) << 32) >> (8 * i) & 255 for i in range(8)]
        picks = [int(s) >> (4 * i) & 15 for i in range(4)]
        out = [(255 * (source[p & 7] >> 7)) if p & 8 else source[p & 7] for p in picks]
        expected.append(sum(v << (8 * i) for i, v in enumerate(out)))
    args = [v.view(np.int32) for v in (a, b, selector)]
    found = run("prmt.b32 $0, $1, $2, $3;", args, "int32")
    np.testing.assert_array_equal(found.view(np.uint32), np.uint32(expected))


@pytest.mark.parametrize("table", range(256))
def test_lop3_truth_tables(table):
    a, b, c = np.int32([0b11110000]), np.int32([0b11001100]), np.int32([0b10101010])
    found = run(f"lop3.b32 $0, $1, $2, $3, {table:#x};", [a, b, c], "int32")
    assert found[0] & 255 == table


def test_mul_hi():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**32, (2, 1000), np.uint32)
    a[0] = b[0] = 2**32 - 1
    found = run("mul.hi.u32 $0, $1, $2;", [a.view(np.int32), b.view(np.int32)], "int32")
    expected = (a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.astype(np.uint32))


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("bf16x2", ml_dtypes.bfloat16), ("f16x2", "float16")]
)
def test_conversions_put_the_second_source_low(suffix, dtype):
    rng = np.random.default_rng(0)
    high, low = rng.standard_normal((2, 1000)).astype(np.float32)
    found = run(f"cvt.rn.{suffix}.f32 $0, $1, $2;", [high, low], "int32").view(np.uint32)
    np.testing.assert_array_equal(found & 0xFFFF, bits(low.astype(dtype)))
    np.testing.assert_array_equal(found >> 16, bits(high.astype(dtype)))


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(KeyError, match="popc"):
        run("popc.b32 $0, $1;", [np.int32([1])], "int32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tables(quant_type, dtype):
    """Scale times codebook in float32, rounded once: bit for bit."""
    with np.errstate(all="ignore"):
        products = (SCALES[:, None] * codebooks.CODEBOOKS[quant_type].values).astype(
            jnp.dtype(dtype)
        )
    for part, word in itertools.product(range(decode.table_count(dtype)), range(8)):
        asm = decode.table_word_asm(quant_type, dtype, part, word)
        found = run(asm, [SCALES], "int32").view(np.uint32)
        meaning = decode.table_word(jnp.asarray(SCALES), quant_type, dtype, part, word)
        byte = 2 * part + word // 4
        entries = bits(products)[:, 4 * (word % 4) :][:, :4] >> (8 * byte) & 255
        expected = (entries.astype(np.uint32) << np.uint32([0, 8, 16, 24])).sum(1, dtype=np.uint32)
        finite = np.isfinite(products.astype(np.float32)).all(1)  # a NaN has many bit patterns
        np.testing.assert_array_equal(found[finite], expected[finite])
        np.testing.assert_array_equal(np.asarray(meaning)[finite].view(np.uint32), expected[finite])


@pytest.mark.parametrize("spare_alu", [False, True])
def test_all_256_bytes_at_every_place(spare_alu):
    """An exhaustive lookup: every byte, as each byte of a word, beside changing neighbours."""
    entries = np.random.default_rng(0).permutation(2**16)[:16].astype(np.uint16)
    split = entries.view(np.uint8).reshape(16, 2).T  # low bytes, high bytes
    words = np.ascontiguousarray(split).reshape(-1).view(np.int32)
    every = np.arange(256, dtype=np.uint8)
    for place in range(4):
        codes = np.stack([np.roll(every, 37 * (i - place)) for i in range(4)], -1)
        codes = np.ascontiguousarray(codes).view(np.int32)[:, 0]
        table = [np.full(256, w) for w in words]
        found = run(decode.pair_asm(place, spare_alu=spare_alu), [codes, *table], "int32").view(
            np.uint32
        )
        np.testing.assert_array_equal(found & 0xFFFF, entries[every >> 4])
        np.testing.assert_array_equal(found >> 16, entries[every & 15])
        meaning = decode.pair(place, jnp.asarray(codes), *map(jnp.asarray, table))
        np.testing.assert_array_equal(np.asarray(meaning).view(np.uint32), found)


def test_a_scale_is_rounded_twice():
    """Contracted into one operation, about a quarter of these would differ."""
    rng = np.random.default_rng(0)
    value, nested = codebooks.DYNAMIC_MAP[rng.integers(0, 256, 4096)], rng.random(4096, np.float32)
    offset = rng.random(4096, np.float32)
    found = jax.jit(lambda *a: emulate(decode.SCALE_ASM, a, "float32"))(value, nested, offset)
    np.testing.assert_array_equal(found, value * nested + offset)
