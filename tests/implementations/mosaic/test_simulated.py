"""The TPU kernels against the reference, simulated with a TPU's memories and copies.

The contract (`tests/implementations/test_contract.py`) runs the same kernels as public calls, in
the simulation that has no memories of its own. `--simulated 284` runs the whole matrix.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.core import blockwise
from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.spec import QuantSpec
from q4jax.pallas.tpu import launch, matmul
from tests.support import oracle, simulated_tpu
from tests.support.kernel_checks import check, odd_input
from tests.support.kernel_matrix import Case, cases
from tests.support.products import assert_product
from tests.support.random_arrays import decoded, normal, random_weight

CASES = [c for c in cases() if c.dtype != "float16" or not c.operation.startswith("linear")][:320]
# The first case of each kind.
QUICK = list({(c.operation, c.quant_type): c for c in reversed(CASES)}.values())
REST = [case for case in CASES if case not in QUICK]


def tile_of(case):
    """A small tile, so that most cases have ragged ends and several steps."""
    return 256 if case.n % 2 else 128


def check_case(case, cores=1):
    with simulated_tpu.tiles_of(tile_of(case)):
        check(case, functools.partial(simulated_tpu.call, cores=cores), roundings=2)


def test_size_of_the_matrix():
    assert len(set(CASES)) == 320
    assert {(c.operation, c.quant_type) for c in QUICK} == {
        (operation, quant_type)
        for operation in ("quantize", "dequantize", "linear", "linear_transpose")
        for quant_type in ("nf4", "fp4")
    }


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_matrix(case):
    check_case(case)


def pytest_generate_tests(metafunc):
    """Other cases of the rest in each run, by its seed."""
    if "of_the_rest" in metafunc.fixturenames:
        count, seed = map(metafunc.config.getoption, ("--simulated", "--seed"))
        chosen = random.Random(seed).sample(REST, min(count, len(REST)))
        metafunc.parametrize("of_the_rest", chosen, ids=lambda case: case.name)


@pytest.mark.heavy
def test_rest_of_the_matrix(of_the_rest):
    check_case(of_the_rest)


# More tiles than one on each axis.
PARALLEL = [
    Case("quantize", "float32", "nf4", 64, False, 200, 320),
    Case("dequantize", "bfloat16", "fp4", 32, True, 140, 320),
    Case("linear", "bfloat16", "nf4", 64, True, 200, 320, 17, True),
    Case("linear_transpose", "float32", "fp4", 64, False, 200, 320, 17),
]


@pytest.mark.heavy
@pytest.mark.parametrize("case", PARALLEL, ids=lambda case: case.operation)
def test_two_cores(case):
    """They share the steps of the axes that are declared parallel."""
    check_case(case, cores=2)


def test_a_race_is_found(monkeypatch):
    """Two cores that add to one block: the axis of the sum declared parallel."""

    def launch_in_parallel(*args, sums, **kwargs):
        return launch.launch(*args, sums=sums - 1, **kwargs)

    monkeypatch.setattr(matmul, "launch", launch_in_parallel)
    weight = random_weight((128, 512))
    x = normal(1, 8, 512)
    with simulated_tpu.tiles_of(128):
        simulated_tpu.run("linear", x, weight.arrays, None, cores=2, spec=weight.quant_state.spec)
    assert simulated_tpu.races_found()


@pytest.mark.parametrize(("dtype", "nested"), [("float32", False), ("bfloat16", True)])
def test_one_weight_of_a_stack(nested, dtype):
    """Chosen by a traced number."""
    weights = [random_weight((n, 320), 64, nested, "nf4", dtype) for n in (200,) * 3]
    codes = [w.packed ^ np.uint8(i) for i, w in enumerate(weights)]
    weights = [type(w)(c, w.quant_state) for w, c in zip(weights, codes, strict=True)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *weights).arrays
    if nested:
        stack = stack._replace(
            offset=stack.offset * jnp.asarray([1, 2, 3], jnp.float32),
            nested_absmax=stack.nested_absmax * jnp.asarray([[3], [2], [1]], jnp.float32),
        )
    spec = weights[0].quant_state.spec
    x, g = normal(1, 5, 320, dtype=dtype), normal(2, 5, 200, dtype=dtype)
    for layer in (1, 2):
        one = jax.tree.map(lambda a, i=layer: a[i], stack)
        w = np.asarray(blockwise.dequantize(one, spec, dtype))
        named = ArraysInStack(stack, (jnp.asarray(layer, jnp.int32),))
        with simulated_tpu.tiles_of(128):
            y = simulated_tpu.call("linear", x, named, None, spec=spec)
            dx = simulated_tpu.call("linear_transpose", g, named, spec=spec)
        assert_product(y, x, w)
        assert_product(dx, g, w.T)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_tiles_that_are_compiled(transpose):
    """Of a weight with a ragged last tile on both axes."""
    weight = random_weight((640, 2304), 64, True, "nf4", "bfloat16")
    spec, w = weight.quant_state.spec, decoded(weight)
    a, b = (
        (normal(1, 17, 640, dtype="bfloat16"), w.T)
        if transpose
        else (normal(1, 17, 2304, dtype="bfloat16"), w)
    )
    if transpose:
        found = simulated_tpu.call("linear_transpose", a, weight.arrays, spec=spec)
    else:
        found = simulated_tpu.call("linear", a, weight.arrays, None, spec=spec)
    assert_product(found, a, b)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_odd_input_as_the_reference(quant_type, blocksize):
    """NaN, inf, zeros, subnormal numbers, and blocks whose reciprocal scale is subnormal."""
    w = odd_input("float32")[:768].reshape(12, 64)
    spec = QuantSpec.from_shape(w.shape, w.dtype, quant_type, blocksize, False)
    packed, absmax = simulated_tpu.call("quantize", w, spec=spec)
    codes, scales = blockwise.quantize_flat(w, spec)
    np.testing.assert_array_equal(np.ravel(packed), codes)
    assert oracle.same_bits(np.ravel(absmax), scales)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_an_activation_that_are_not_finite(dtype):
    """One of them reaches its row of the product and its column of the gradient, and no other."""
    weight = random_weight((128, 256), 64, False, "nf4", dtype)
    spec = weight.quant_state.spec
    x = normal(1, 4, 256, dtype=dtype).at[1, 77].set(jnp.inf).at[2, 130].set(jnp.nan)
    y = np.asarray(simulated_tpu.call("linear", x, weight.arrays, None, spec=spec), np.float32)
    w = decoded(weight)
    assert np.isfinite(y[[0, 3]]).all() and np.isnan(y[2]).all()
    np.testing.assert_array_equal(np.isnan(y[1]), w[:, 77] == 0)
    absmax = weight.arrays.absmax.at[5, 1].set(jnp.inf)
    arrays = weight.arrays._replace(absmax=absmax)
    g = jnp.ones((3, 128), dtype)
    dx = simulated_tpu.call("linear_transpose", g, arrays, spec=spec)
    dx = np.asarray(dx, np.float32)
    assert (
        np.isfinite(np.delete(dx, np.s_[64:128], 1)).all() and not np.isfinite(dx[:, 64:128]).any()
    )
