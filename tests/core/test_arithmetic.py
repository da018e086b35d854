"""Division by integers, and quantization with it, against XLA's CPU backend and numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.core import blockwise
from q4jax.core.arithmetic import CPU, PORTABLE, flush
from q4jax.core.spec import QuantSpec
from q4jax.pallas.quantize import _encode
from tests.support import gradual, oracle

TINY = np.finfo(np.float32).smallest_normal
SPECIALS = np.float32(
    [
        *(0, 1, np.inf, np.nan, TINY, TINY * 1.5, TINY / 2, 1e-45, 2.0**126, 2.0**127, 3, 1 / 3),
        *(np.finfo(np.float32).max, np.nextafter(np.float32(1), np.float32(2))),
        np.nextafter(np.float32(2), np.float32(1)),
    ]
)


def bits(x):
    return np.asarray(x).view(np.uint32)


def ieee_quotient(x, by):
    """Rounded once from float64, which is innocuous; zero where the rounded quotient is tiny."""
    x, by = (np.where(np.abs(a) < TINY, np.copysign(np.float32(0), a), a) for a in (x, by))
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64) / by.astype(np.float64)
        # Not the subnormal grid, but one as fine as that of normal numbers, says what is tiny.
        tiny = np.abs(wide) < TINY * (1 - 2.0**-25)
        return np.where(tiny, np.copysign(np.float32(0), wide), wide).astype(np.float32)


def assert_quotients(x, by):
    found = np.asarray(jax.jit(PORTABLE.divide)(x, by))
    expected = ieee_quotient(x, by)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    same = (bits(found) == bits(expected)) | np.isnan(expected)
    assert same.all(), (x[~same][:3], by[~same][:3], found[~same][:3], expected[~same][:3])


def from_bits(rng, low, high, size):
    return rng.integers(low, high, size, np.uint32).view(np.float32)


def test_reciprocals_of_all_significands():
    by = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(np.float32)
    np.testing.assert_array_equal(
        bits(jax.jit(PORTABLE.reciprocal)(by)), bits(ieee_quotient(np.ones_like(by), by))
    )


def test_quotients_of_any_bits(rng):
    assert_quotients(*(from_bits(rng, 0, 2**32, 2**18) for _ in range(2)))


def test_quotients_at_the_edges_of_the_range(rng):
    smallest = from_bits(rng, 0x00800000, 0x01800000, 2**18)
    assert_quotients(smallest, from_bits(rng, 0x3F800000, 0x40800000, 2**18))
    largest = from_bits(rng, 0x7F000000, 0x7F800000, 2**18)
    assert_quotients(largest, from_bits(rng, 0x3F000000, 0x40000000, 2**18))


def test_quotients_next_to_half_way(rng):
    """x is the number nearest to a denominator times the middle of two neighbours."""
    by = from_bits(rng, 0x3F800000, 0x40000000, 2**18)
    middle = from_bits(rng, 0x3F800000, 0x40000000, 2**18).astype(np.float64) + 2.0**-24
    x = (by * middle).astype(np.float32)
    for step in (-1, 0, 1):
        assert_quotients((x.view(np.int32) + step).view(np.float32), by)


def test_quotients_of_special_numbers():
    every = np.concatenate([SPECIALS, -SPECIALS])
    x, by = (a.ravel() for a in np.meshgrid(every, every))
    assert_quotients(x, by)


def test_flush_keeps_signs_and_what_is_not_subnormal():
    every = np.concatenate([SPECIALS, -SPECIALS])
    found = gradual.run(flush, every)
    expected = np.where(np.abs(every) < TINY, np.copysign(np.float32(0), every), every)
    same = (bits(found) == bits(expected)) | np.isnan(every)
    assert same.all()


def wild(rng, shape):
    """A weight with blocks of 32 at the edges of the range, and special numbers."""
    w = rng.normal(size=shape).astype(np.float32)
    flat = w.reshape(-1)
    for block, factor in enumerate((1e-40, 1e-38, 3e-38, 1e-30, 1e38, 3e38, 1.0, 0.0, 1e-42)):
        flat[32 * block :][:32] *= np.float32(factor)
    flat[32 * 9 :][:32] = SPECIALS[rng.integers(0, 15, 32)]
    # Beside a large number all others underflow when they are scaled.
    flat[32 * 10 :][:32] *= np.float32(1e-37)
    flat[32 * 10] = 1e4
    flat[32 * 11 :][:32] = rng.integers(-3, 4, 32) * TINY
    flat[32 * 11] = 2.0**126
    return w


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(32, 64), (37, 27), (13, 1)])
def test_quantize_with_subnormal_numbers(shape, quant_type, dtype, rng):
    """Where subnormal numbers exist, the portable way gives what CPU gives without them."""
    with np.errstate(all="ignore"):
        w = jnp.asarray(wild(rng, (32, 64)).astype(jnp.dtype(dtype)).ravel()[: np.prod(shape)])
    w = w.reshape(shape)
    spec = QuantSpec.from_shape(shape, dtype, quant_type, 32, False)
    portable = functools.partial(blockwise.quantize_flat_by, PORTABLE, spec=spec)
    on_cpu = jax.jit(functools.partial(blockwise.quantize_flat_by, CPU, spec=spec))(w)
    for found in (gradual.run(portable, w), jax.jit(portable)(w)):
        np.testing.assert_array_equal(found[0], on_cpu[0])
        np.testing.assert_array_equal(bits(found[1]), bits(on_cpu[1]))
    with np.errstate(all="ignore"):
        codes, scales = oracle.quantize(w, quant_type, 32)
    np.testing.assert_array_equal(on_cpu[0], codes)
    np.testing.assert_array_equal(on_cpu[1], scales)


def test_flushing_matters(rng):
    """What the test above compares would differ without it."""
    with np.errstate(all="ignore"):
        w = jnp.asarray(wild(rng, (32, 64)))
    spec = QuantSpec.from_shape(w.shape, w.dtype, "fp4", 32, False)
    careless = PORTABLE._replace(flush=lambda x: x)
    found = gradual.run(functools.partial(blockwise.quantize_flat_by, careless, spec=spec), w)
    expected = blockwise.quantize_flat(w, spec)
    assert (np.asarray(found[0]) != np.asarray(expected[0])).any()


@pytest.mark.parametrize(
    ("size", "factor"), [(1, 1.0), (255, 1e-36), (255, 1e-38), (300, 1e-40), (300, 3e38), (1000, 1)]
)
def test_double_quantize_with_subnormal_numbers(size, factor, rng):
    with np.errstate(all="ignore"):
        absmax = jnp.asarray(np.abs(rng.normal(size=size)).astype(np.float32) * np.float32(factor))
    portable = functools.partial(blockwise.double_quantize_by, PORTABLE)
    on_cpu = jax.jit(functools.partial(blockwise.double_quantize_by, CPU))(absmax)
    for found in (gradual.run(portable, absmax), jax.jit(portable)(absmax)):
        np.testing.assert_array_equal(found[0], on_cpu[0])
        for a, b in zip(found[1:], on_cpu[1:], strict=True):
            assert ((bits(a) == bits(b)) | (np.isnan(a) & np.isnan(b))).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_of_subnormal_numbers_in_the_kernel(quant_type):
    """They are those of zero."""
    scaled = np.float32([0, -0.0, 1e-40, -1e-40, TINY * (1 - 2.0**-23), TINY, -TINY])
    codes = np.asarray(gradual.run(functools.partial(_encode, quant_type=quant_type), scaled))
    assert (codes[:5] == oracle.ZERO[quant_type]).all()
    assert (codes[5] == 8) == (quant_type == "fp4")
