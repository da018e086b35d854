"""The products in every instruction set, against numpy in float64 on the weight as rounded."""

import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.native import calls as ops
from tests.support.native_kernels import (
    DTYPES,
    assert_product,
    in_every_isa,
    in_use,
    linear,
    settings,
    transposed,
)
from tests.support.random_arrays import decoded, normal, random_weight

pytestmark = in_use

# (shape, blocksize): one chunk, ragged rows of both, several scales a chunk with a partial last
# chunk, several chunks a scale, several tiles.
LAYOUTS = [
    ((3, 64), 64),
    ((50, 96), 32),
    ((7, 32), 32),
    ((33, 256), 128),
    ((20, 4096), 4096),
    ((130, 1056), 32),
    ((301, 640), 64),
]
ROWS = [1, 2, 3, 5, 8, 9, 12, 17, 40]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocksize"), LAYOUTS)
def test_products(shape, blocksize, dtype):
    n, k = shape
    for i, m in enumerate(ROWS):
        weight = random_weight(shape, blocksize, i % 2 == 0, ("nf4", "fp4")[i // 2 % 2])
        x, g, bias = normal(1, m, k, dtype=dtype), normal(2, m, n, dtype=dtype), normal(3, n)
        bias = None if i % 3 == 0 else bias.astype(DTYPES[i % 3])
        w = decoded(weight, dtype)
        for y in in_every_isa(linear(weight), x, *weight.arrays, bias):
            assert y.dtype == x.dtype
            assert_product(y, x, w, 0.0 if bias is None else bias)
        for dx in in_every_isa(transposed(weight), g, *weight.arrays):
            assert dx.dtype == g.dtype
            assert_product(dx, g, w.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_the_weight_bit_for_bit(blocksize, quant_type, dtype):
    """Read out by one-hot rows, a few and many at a time, and by `dequantize`."""
    n, k = 5, 3 * blocksize
    weight = random_weight((n, k), blocksize, True, quant_type)
    w = decoded(weight, dtype)
    some = np.linspace(0, k - 1, 40).astype(int)
    one_hot = jnp.zeros((40, k), dtype).at[jnp.arange(40), some].set(1)

    def readings(x, eye, arrays):
        return (
            linear(weight)(x, *arrays),
            linear(weight)(x[:7], *arrays),
            transposed(weight)(eye, *arrays),
            ops.dequantize(*arrays, **settings(weight), dtype=dtype),
        )

    eye = jnp.eye(n, dtype=dtype)
    for many, few, rows, whole in in_every_isa(readings, one_hot, eye, weight.arrays):
        np.testing.assert_array_equal(many, w[:, some].T)
        np.testing.assert_array_equal(few, w[:, some[:7]].T)
        np.testing.assert_array_equal(rows, w)
        np.testing.assert_array_equal(whole, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_not_finite(dtype):
    """They reach every element of their block and nothing else."""
    weight = random_weight((4, 128), 64, False)
    all_ones = np.frombuffer(np.uint32(0x7FFFFFFF).tobytes(), np.float32)[0]  # a NaN
    absmax = np.array(weight.quant_state.absmax)
    absmax[0, 0], absmax[1, 1], absmax[2, 0] = all_ones, np.inf, 1e38
    arrays = weight.arrays._replace(absmax=jnp.asarray(absmax))

    def both(arrays):
        w = ops.dequantize(*arrays, **settings(weight), dtype=dtype)
        return w.astype(jnp.float32), linear(weight)(jnp.ones((1, 128), dtype), *arrays)

    for w, y in in_every_isa(both, arrays):
        assert np.isnan(w[0, :64]).all()
        assert not np.isfinite(w[1, 64:]).any()
        assert np.isfinite(w[0, 64:]).all()
        assert np.isfinite(w[3]).all()
        assert np.isnan(y[0, 0])


def test_no_rows():
    weight = random_weight((8, 64))
    for y in in_every_isa(linear(weight), jnp.zeros((0, 64)), *weight.arrays):
        assert y.shape == (0, 8)
    for dx in in_every_isa(transposed(weight), jnp.zeros((0, 8)), *weight.arrays):
        assert dx.shape == (0, 64)
