"""Quantization in every instruction set: bitsandbytes' bytes, and the reference's on odd input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax import QuantSpec
from q4jax.core import blockwise
from q4jax.native import calls as ops
from tests.support import oracle
from tests.support.native_kernels import DTYPES, in_every_isa, in_use
from tests.support.random_arrays import normal
from tests.support.vectors import BLOCKSIZES, MANIFEST, decode, npz, under

pytestmark = in_use


def quantize(quant_type, blocksize=64):
    return functools.partial(ops.quantize, quant_type=quant_type, blocksize=blocksize)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", sorted(MANIFEST["quant"]))
def test_golden(name, quant_type):
    file, info = npz(f"quant/{name}.npz"), MANIFEST["quant"][name]
    w = jnp.asarray(decode(file["input"], info["dtype"]))
    for blocksize in BLOCKSIZES:
        expected = under(f"{quant_type}/{blocksize}/", file)
        if "packed" not in expected:
            continue
        for packed, absmax in in_every_isa(quantize(quant_type, blocksize), w):
            np.testing.assert_array_equal(packed, expected["packed"])
            assert oracle.same_bits(absmax, expected["absmax"])


def odd_input(dtype):
    """Blocks of 64: all kinds of numbers, then a partial one."""
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal(64) for _ in range(12)]
    blocks[1][:] = 0
    blocks[2][5] = np.nan
    blocks[3][7] = -np.inf
    blocks[4] *= 1e-40  # subnormal in float32
    blocks[5] *= 2e38
    blocks[6] *= 1e-37
    blocks[7][:] = -0.0
    blocks[8][0] = np.nan
    blocks[8][1] = np.inf
    blocks[9] = np.sign(blocks[9])
    with np.errstate(all="ignore"):
        return jnp.asarray(
            np.concatenate([*blocks, rng.standard_normal(11)]).astype(np.float32)
        ).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_odd_input_as_the_reference(quant_type, dtype):
    w = odd_input(dtype)
    for size in (w.size, w.size - 1, 768, 31):
        spec = QuantSpec.from_shape((size,), dtype, quant_type, 64, False)
        expected = jax.jit(blockwise.quantize_flat, static_argnums=1)(w[:size], spec)
        for found in in_every_isa(quantize(quant_type), w[:size]):
            for a, b in zip(found, expected, strict=True):
                assert oracle.same_bits(a, b), size


def test_every_threshold_and_its_neighbours():
    """Blocks of scale 1 in which every other value lies on or beside a threshold."""
    for quant_type in ("nf4", "fp4"):
        ascending = oracle.CODE[quant_type][oracle.ORDER[quant_type]]
        at = oracle.midpoints(ascending)
        values = np.concatenate(
            [at, np.nextafter(at, np.float32(2)), np.nextafter(at, -np.float32(2))]
        )
        w = np.resize(values, 96).reshape(2, 48)
        w = np.concatenate([w, np.ones((2, 16), np.float32)], axis=1)
        expected = oracle.quantize(w, quant_type, 64)
        for found in in_every_isa(quantize(quant_type), jnp.asarray(w)):
            np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5000])
def test_scales_as_the_reference(size):
    absmax = jnp.abs(normal(4, size)) + 1
    for values in (absmax, jnp.ones(size), absmax.at[0].set(jnp.nan), absmax.at[0].set(jnp.inf)):
        expected = jax.jit(blockwise.double_quantize)(values)
        found = ops.double_quantize(values)
        for a, b in zip(found, expected, strict=True):
            assert oracle.same_bits(a, b)


def test_both_halves_of_quantization_are_the_default():
    quantize = jax.jit(lambda w: q4jax.quantize_4bit(w, 64, True, "nf4"))
    text = quantize.lower(normal(1, 96, 128)).as_text()
    assert "q4jax_quantize_scales" in text
    assert text.count("q4jax_quantize") == 2
