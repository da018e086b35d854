"""The Triton kernels as they are compiled for GPUs, executed on this CPU as the Pallas ones are.

`tests/implementations/gpu/test_executed.py` says what that finds. `--executed 2000` runs all cases
of the matrix that are products.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

import q4jax
from q4jax.gpu import tiles
from q4jax.ops import registry
from q4jax.triton import requirements
from tests.support.kernel_checks import check
from tests.support.kernel_matrix import Case, cases
from tests.support.products import assert_product
from tests.support.ptx.faults import Unknown
from tests.support.ptx.global_memory import OverlappingResults
from tests.support.ptx.launches import Executor
from tests.support.ptx.machine import Machine
from tests.support.random_arrays import decoded, normal, random_weight

pytestmark = pytest.mark.skipif(
    bool(requirements._missing()) or not importlib.util.find_spec("jax_cuda13_plugin"),
    reason=requirements._missing() or "needs the extra cuda",
)

# GPU -> its share of `--executed`.
SHARES = {"sm_80": 1 / 8, "sm_90": 1 / 12, "sm_89": 1 / 40}
TRITON = registry.IMPLEMENTATIONS["triton"]
ROUNDINGS = 16  # of sums that are split over programs
CASES = [case for case in cases() if case.operation.startswith("linear")]


class TilesThatOverlap(Machine):
    """The last tile of a result is whole, so that others have computed a part of it, too."""

    global_memory = OverlappingResults


def pytest_generate_tests(metafunc):
    if {"gpu", "case"} <= set(metafunc.fixturenames):
        count = metafunc.config.getoption("--executed")
        chosen = [(gpu, c) for gpu, share in SHARES.items() for c in CASES[: round(count * share)]]
        metafunc.parametrize(("gpu", "case"), chosen, ids=[f"{g}-{c.name}" for g, c in chosen])


@pytest.fixture(params=["sm_80", "sm_90"])
def executor(request):
    return Executor(request.param, TilesThatOverlap)


def call(executor, op, *operands, **static):
    """An op of the implementation "triton"."""
    return executor(functools.partial(getattr(TRITON, op), **static), *operands)


def test_matrix(gpu, case):
    executor = Executor(gpu, TilesThatOverlap)
    check(case, functools.partial(call, executor), ROUNDINGS)
    [launch] = executor.launches
    assert launch.name == f"q4jax_{case.operation}"
    assert f".target {gpu}" in launch.ptx


@pytest.mark.parametrize(
    "case",
    [
        Case("linear", "bfloat16", "nf4", 64, True, 70, 2496, m=3, bias=True),
        Case("linear", "float16", "fp4", 128, False, 129, 4096 + 128, m=40),
        Case("linear_transpose", "bfloat16", "nf4", 64, True, 600, 320, m=3),
    ],
    ids=lambda case: case.name,
)
def test_sums_that_are_split(executor, case):
    transpose = case.operation == "linear_transpose"
    tile = tiles.choose(case.m, (case.n, case.k), case.dtype, transpose=transpose)
    assert tile.splits > 1
    check(case, functools.partial(call, executor), ROUNDINGS)
    [launch] = executor.launches
    assert launch.results[0].shape[1] == tile.splits


@pytest.mark.parametrize("batched", ["x", "weight", "both"])
def test_vmap(executor, batched):
    """One launch for all, with programs for each element of the batch."""
    many = [random_weight((70, 320), 64, True) for _ in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *many)
    x = normal(1, 3, 5, 320)
    axes = {"x": (0, None), "weight": (None, 0), "both": (0, 0)}[batched]
    args = x if axes[0] == 0 else x[0], stack if axes[1] == 0 else many[0]
    matmul = functools.partial(q4jax.matmul_4bit, implementation="triton")
    y = executor(jax.vmap(matmul, axes), *args)
    for i in range(3):
        weight = decoded(many[i] if axes[1] == 0 else many[0])
        assert_product(y[i], x[i] if axes[0] == 0 else x[0], weight, roundings=ROUNDINGS)
    assert len(executor.launches) == 1


def test_gradient(executor):
    """The transposed product comes from differentiating the public call."""
    weight, x, g = random_weight((70, 192)), normal(1, 5, 192), normal(2, 5, 70)

    def both(x, g):
        matmul = functools.partial(q4jax.matmul_4bit, implementation="triton")
        y, vjp = jax.vjp(lambda x: matmul(x, weight), x)
        return y, *vjp(g)

    y, dx = executor(both, x, g)
    w = decoded(weight)
    assert_product(y, x, w, roundings=ROUNDINGS)
    assert_product(dx, g, w.T, roundings=ROUNDINGS)
    assert {e.name for e in executor.launches} == {"q4jax_linear", "q4jax_linear_transpose"}


def test_what_is_not_executed_for_sm_100():
    """The limit of the machine, which does not know Blackwell's tensor cores."""
    case = next(c for c in CASES if c.dtype == "bfloat16" and c.operation == "linear")
    with pytest.raises(Unknown, match="tcgen05"):
        check(case, functools.partial(call, Executor("sm_100", TilesThatOverlap)), ROUNDINGS)
