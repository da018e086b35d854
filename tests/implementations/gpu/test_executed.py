"""The kernels as they are compiled for GPUs, executed on this CPU.

Interpret mode runs what the kernels say. Here runs what the compiler made of them: the PTX of each
launch with its real grid, in a machine that also finds races, accesses outside of arrays, reads of
what nothing wrote, and bytes of results that are not written. Needs the extra `aot`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec
from q4jax.gpu import tiles
from q4jax.ops import registry
from tests.support import oracle
from tests.support.executed_calls import ROUNDINGS, check_gradient, check_vmap
from tests.support.gpu.aot import needs_aot
from tests.support.implementations import variants
from tests.support.kernel_checks import check, odd_input
from tests.support.kernel_matrix import DTYPES, Case, cases
from tests.support.products import assert_product
from tests.support.ptx.faults import Unknown
from tests.support.ptx.launches import Executor
from tests.support.random_arrays import decoded, normal, random_weight

pytestmark = needs_aot()

# GPU -> its share of `--executed`. sm_89 and sm_120 have the instructions of sm_80, but for few.
SHARES = {"sm_80": 1, "sm_90": 2 / 3, "sm_89": 1 / 6, "sm_120": 1 / 6, "sm_100": 1 / 6}
PALLAS = registry.IMPLEMENTATIONS["pallas"]
CASES = cases()


def uses_tcgen05(case):
    """Whether the kernel for sm_100 has instructions that the machine does not know."""
    large = case.operation == "linear" or (case.operation == "linear_transpose" and case.m > 32)
    return large and case.dtype != "float32"


def pytest_generate_tests(metafunc):
    if {"gpu", "case"} <= set(metafunc.fixturenames):
        count = metafunc.config.getoption("--executed")
        chosen = []
        for gpu, share in SHARES.items():
            known = [c for c in CASES if gpu != "sm_100" or not uses_tcgen05(c)]
            chosen += [(gpu, case) for case in known[: round(count * share)]]
        metafunc.parametrize(("gpu", "case"), chosen, ids=[f"{g}-{c.name}" for g, c in chosen])


@pytest.fixture(params=[gpu for gpu in SHARES if gpu != "sm_100"])
def executor(request):
    return Executor(request.param)


def call(executor, op, *operands, **static):
    """An op of the implementation "pallas"."""
    return executor(functools.partial(getattr(PALLAS, op), **static), *operands)


def test_matrix(gpu, case):
    executor = Executor(gpu)
    check(case, functools.partial(call, executor), ROUNDINGS)
    [launch] = executor.launches
    assert launch.name == f"q4jax_{case.operation}"
    assert f".target {gpu}" in launch.ptx


@pytest.mark.parametrize("case", [c for c in CASES if uses_tcgen05(c)][:3], ids=lambda c: c.name)
def test_what_is_not_executed_for_sm_100(case):
    """The limit of the machine: a release of the compiler that moves it should be noticed."""
    with pytest.raises(Unknown, match="tcgen05"):
        check(case, functools.partial(call, Executor("sm_100")), ROUNDINGS)


# K or N that is long enough to be split, with a last share that is shorter.
SPLIT = [
    Case("linear", "bfloat16", "nf4", 64, True, 70, 2496, m=3, bias=True),
    Case("linear", "float16", "fp4", 128, False, 129, 4096 + 128, m=17),
    Case("linear", "float32", "nf4", 64, True, 65, 1024 + 64, m=1, bias=True),
    Case("linear_transpose", "bfloat16", "nf4", 64, True, 600, 320, m=3),
    Case("linear_transpose", "float16", "fp4", 128, False, 1030, 128, m=17),
    Case("linear_transpose", "float32", "nf4", 64, True, 300, 64, m=1),
]


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_sums_that_are_split(executor, case):
    transpose = case.operation == "linear_transpose"
    tile = tiles.choose(case.m, (case.n, case.k), case.dtype, transpose=transpose)
    assert tile.splits > 1
    check(case, functools.partial(call, executor), ROUNDINGS)
    [launch] = executor.launches
    assert launch.results[0].shape[0] == tile.splits
    across = -(-case.k // tile.k) if transpose else -(-case.n // tile.n)
    assert launch.launch.grid[:2] == (-(-case.m // tile.m), across * tile.splits)


@pytest.mark.parametrize("batched", ["x", "weight", "both"])
def test_vmap(executor, batched):
    """One launch for all, with an axis more in its grid."""
    check_vmap(executor, "pallas", batched)
    assert np.prod(executor.launches[0].launch.grid) >= 3 * 2 or batched == "x"


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_in_a_stack(executor, nested):
    """The kernels read the stack's own arrays, at the place of an index that is data."""
    many = [random_weight((70, 320), 64, nested) for _ in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *many)
    x, g = normal(1, 5, 320), normal(2, 5, 70)

    def both(x, g, number):
        weight = q4jax.weight_of_stack(stack, number)
        y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight, implementation="pallas"), x)
        return y, *vjp(g)

    for number in (0, 2):
        y, dx = executor(both, x, g, number)
        w = decoded(many[number])
        assert_product(y, x, w, roundings=ROUNDINGS)
        assert_product(dx, g, w.T, roundings=ROUNDINGS)
    for launch in executor.launches:
        assert (3, 70, 5, 8) in {operand.shape for operand in launch.operands}


def test_vmapped_quantize_and_dequantize(executor):
    w = normal(0, 3, 24, 64)
    weight = executor(
        jax.vmap(lambda w: q4jax.Params4bit.quantize(w, 64, True, "nf4", implementation="pallas")),
        w,
    )
    for i in range(3):
        expected = q4jax.Params4bit.quantize(w[i], 64, True, "nf4", implementation="xla")
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], weight), expected
        )
    dense = executor(
        jax.vmap(functools.partial(q4jax.dequantize_4bit, implementation="pallas")), weight
    )
    for i in range(3):
        assert oracle.same_bits(dense[i], decoded(jax.tree.map(lambda a, i=i: a[i], weight)))


def test_gradient(executor):
    check_gradient(executor, "pallas")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_odd_input(executor, quant_type, dtype):
    """NaN, infinity, zeros, subnormal and huge numbers."""
    w = odd_input(dtype)[:768]
    spec = QuantSpec.from_shape(w.shape, dtype, quant_type, 64, False)
    expected = variants()[0].run("quantize", w, spec=spec)
    found = call(executor, "quantize", w, spec=spec)
    for one, reference in zip(found, expected, strict=True):
        assert oracle.same_bits(one, reference)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_threshold_and_its_neighbours(executor, quant_type):
    at = codebooks.CODEBOOKS[quant_type].thresholds
    values = np.concatenate([at, np.nextafter(at, np.float32(2)), np.nextafter(at, -np.float32(2))])
    w = np.concatenate([np.resize(values, 96).reshape(2, 48), np.ones((2, 16), np.float32)], axis=1)
    spec = QuantSpec.from_shape(w.shape, "float32", quant_type, 64, False)
    packed, _ = call(executor, "quantize", jnp.asarray(w), spec=spec)
    np.testing.assert_array_equal(np.ravel(packed), oracle.quantize(w, quant_type, 64)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_not_finite(executor, dtype):
    """They reach every element of their block and nothing else. Subnormal weights are kept, which
    XLA's CPU backend counts as zero."""
    weight = random_weight((4, 128), 64, False)
    spec = dataclasses.replace(weight.quant_state.spec, dtype=dtype)
    absmax = np.array(weight.quant_state.absmax)
    absmax[0, 0], absmax[1, 1], absmax[2, 0], absmax[3, 1] = np.nan, np.inf, 1e38, 1e-39
    arrays = weight.arrays._replace(absmax=jnp.asarray(absmax))
    found = call(executor, "dequantize", arrays, spec=spec, dtype=jnp.dtype(dtype))
    packed = np.asarray(arrays.packed)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(4, 128)
    values = codebooks.CODEBOOKS[spec.quant_type].values[codes]
    with np.errstate(all="ignore"):
        expected = (values * np.repeat(absmax, 64, axis=1)).astype(jnp.dtype(dtype))
    assert np.isnan(expected[0, :64].astype(np.float32)).all()
    assert oracle.same_bits(found, expected)
