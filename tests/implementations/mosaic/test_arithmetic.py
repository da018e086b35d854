"""The parts of the TPU kernels that are plain arithmetic, and their place in registers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.pallas.tpu import order, tiles
from q4jax.pallas.tpu.division import divide

SPECIAL = np.array(
    [0, np.inf, np.nan, 1e-40, 2.0**-126, 1.5 * 2.0**-126, 1, 2 - 2.0**-23, 2.0**126, 3e38],
    np.float32,
)


def flush(x):
    """Zeros for subnormal numbers, as XLA has them."""
    return np.where(np.abs(x) < 2.0**-126, x * np.float32(0), x).astype(np.float32)


def quotient(x, by):
    """The float32 nearest to x / by. The float64 quotient is rounded once more, which changes
    nothing: it is never half way between two float32, nor within a float64's error of that."""
    with np.errstate(all="ignore"):
        return flush(np.float32(np.float64(flush(x)) / np.float64(flush(by))))


def assert_divides(x, by):
    found, expected = np.asarray(jax.jit(divide)(x, by)), quotient(x, by)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def test_division_over_all_pairs_of_exponents(rng):
    """256 x 256 of them, with random significands and signs, the extreme significands too."""
    x_exponent, by_exponent = np.indices((256, 256), np.uint32)

    def floats(exponent, fraction):
        sign = rng.integers(0, 2, exponent.shape, np.uint32) << 31
        return (sign | (exponent << 23) | fraction).view(np.float32)

    def fractions():
        return rng.integers(0, 1 << 23, (256, 256), np.uint32)

    most = np.full((256, 256), (1 << 23) - 1, np.uint32)
    for own, other in ((fractions(), fractions()), (most, fractions()), (fractions(), most)):
        assert_divides(floats(x_exponent, own), floats(by_exponent, other))


def test_division_of_special_numbers():
    values = np.concatenate([SPECIAL, -SPECIAL])
    assert_divides(np.repeat(values, len(values)), np.tile(values, len(values)))


def test_reciprocals_of_every_256th_significand():
    by = (np.uint32(127 << 23) + np.arange(0, 1 << 23, 256, dtype=np.uint32)).view(np.float32)
    assert_divides(np.ones_like(by), by)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orders_are_inverse_and_move_bits(dtype):
    """Each value of 16 bits, NaN of all payloads included."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    x = bits.view(jnp.bfloat16) if dtype == "bfloat16" else (bits.astype("u4") << 16).view("f4")
    static = {"dtype": jnp.dtype(dtype), "interpret": True}
    there = jax.jit(functools.partial(order.as_decoded, **static))(jnp.asarray(x))
    back = jax.jit(functools.partial(order.as_stored, **static))(there)
    unsigned = f"u{x.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(back).view(unsigned), x.view(unsigned))
    assert (np.asarray(there).view(unsigned) != x.view(unsigned)).any()


@pytest.mark.parametrize("k", [1, 128, 200, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_replace_whatever_there_is(dtype, k):
    x = jnp.full((16, 256), jnp.nan, dtype)
    found = np.asarray(jax.jit(order.zero_from)(x, k), np.float32)
    assert np.isnan(found[:, :k]).all() and not found[:, k:].any()


def test_tiles():
    """They fit the registers and the weight, and decode little beyond a long row."""
    for transpose in (False, True):
        for dtype in ("float32", "bfloat16"):
            for rows in (1, 16, 17, 128, 129, 4096):
                for n, k in ((128, 128), (4096, 4096), (130, 11008), (14336, 3200)):
                    tile = tiles.choose(rows, n, k, jnp.dtype(dtype), transpose=transpose)
                    assert tile.m % 16 == 0 and (tile.m >= rows or tile.m >= 256)
                    assert tile.n % tile.columns == 0 and tile.columns % 128 == 0 and tile.n <= n
                    assert tile.k % 128 == 0 and tile.k & (tile.k - 1) == 0 and tile.k <= k
                    assert -(-k // tile.k) * tile.k <= 1.3 * k
