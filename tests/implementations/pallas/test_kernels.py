"""Every kernel in interpret mode against the reference, over the matrix of calls.

Interpret mode fills what lies outside an array with NaN (the least integer, for integers), so a
mask that lets any of it through shows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from tests.support import oracle
from tests.support.kernel_matrix import cases
from tests.support.random_arrays import decoded, normal, random_weight

CASES = cases()
# Interpreted kernels are large programs that run once: optimizing them takes longer than running.
QUICK = {"xla_backend_optimization_level": 0}
INTERPRET = {"implementation": "pallas_interpret"}


def run(function, *args):
    return jax.jit(function).lower(*args).compile(QUICK)(*args)


def weight_of(case):
    """A weight, and what it stands for."""
    shape = (case.n, case.k)
    weight = random_weight(shape, case.blocksize, case.nested, case.quant_type, case.dtype)
    return weight, decoded(weight)


def f64(array):
    return np.asarray(array).astype(np.float64)


def assert_product(found, a, b, extra=0.0):
    """`a @ b.T + extra`, to what a float32 sum of K terms in any order and one rounding allow."""
    exact = f64(a) @ f64(b).T + f64(extra)
    terms = np.abs(f64(a)) @ np.abs(f64(b)).T + np.abs(f64(extra))
    # The sums of splits add at most as many roundings again as there are terms.
    summed = (a.shape[-1] + 16) * 2.0**-24 * terms
    info = jnp.finfo(found.dtype)
    rounded = float(info.eps) / 2 * (np.abs(exact) + summed)
    assert found.shape == exact.shape
    assert (np.abs(f64(found) - exact) <= summed + rounded + float(info.smallest_subnormal)).all()


def check_quantize(case):
    w = normal(case.n, case.n, case.k, dtype=case.dtype)
    settings = (case.blocksize, case.nested, case.quant_type)
    packed, state = run(lambda w: q4jax.quantize_4bit(w, *settings, **INTERPRET), w)
    blocks = np.asarray(w).astype(np.float32).reshape(-1, case.blocksize)
    scaled, absmax = zip(*(oracle.scale_block(b, case.blocksize) for b in blocks), strict=True)
    order = oracle.ORDER[case.quant_type]
    midpoints = oracle.midpoints(oracle.CODE[case.quant_type][order])
    codes = np.uint8(order)[np.searchsorted(midpoints, np.stack(scaled), side="left")]
    expected = codes[:, ::2] << 4 | codes[:, 1::2]
    assert (packed.dtype, packed.shape) == (jnp.uint8, (case.n, case.k // 2))
    np.testing.assert_array_equal(np.asarray(packed).reshape(expected.shape), expected)
    np.testing.assert_array_equal(np.asarray(state.absmax).ravel(), np.float32(absmax))


def check_dequantize(case):
    weight, expected = weight_of(case)
    found = run(lambda weight: q4jax.dequantize_4bit(weight, **INTERPRET), weight)
    assert oracle.same_bits(found, expected)


def check_linear(case):
    weight, expected = weight_of(case)
    x = normal(1, case.m, case.k, dtype=case.dtype)
    bias = normal(2, case.n) if case.bias else None
    found = run(lambda *a: q4jax.matmul_4bit(*a[:2], bias=a[2], **INTERPRET), x, weight, bias)
    assert_product(found, x, expected, 0.0 if bias is None else bias)


def check_linear_transpose(case):
    weight, expected = weight_of(case)
    g = normal(1, case.m, case.n, dtype=case.dtype)

    def gradient(g, weight):
        x = jnp.zeros((case.m, case.k), case.dtype)
        return jax.vjp(functools.partial(matmul, weight), x)[1](g)[0]

    assert_product(run(gradient, g, weight), g, expected.T)


def matmul(weight, x):
    return q4jax.matmul_4bit(x, weight, **INTERPRET)


def check(case):
    """Run a case and compare."""
    globals()[f"check_{case.operation}"](case)


def test_size_of_the_matrix():
    assert len(set(CASES)) == len(CASES) >= 1000
    assert {c.operation for c in CASES} == {"quantize", "dequantize", "linear", "linear_transpose"}


@pytest.mark.parametrize("case", CASES[:64], ids=lambda c: c.name)
def test_sample(case):
    check(case)


def pytest_generate_tests(metafunc):
    if "heavy_case" in metafunc.fixturenames:
        count = metafunc.config.getoption("--kernel-calls")
        metafunc.parametrize("heavy_case", CASES[64:count], ids=lambda c: c.name)


@pytest.mark.heavy
def test_matrix(heavy_case):
    check(heavy_case)
