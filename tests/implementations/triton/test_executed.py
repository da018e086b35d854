"""The Triton kernels as they are compiled for GPUs, executed on this CPU as the Pallas ones are.

`tests/implementations/gpu/test_executed.py` says what that finds. `--executed 8064` runs all cases
of the matrix that are products for sm_80 and sm_90, and 202 of the 672 for sm_89.
"""

import functools

import pytest

from q4jax.gpu import tiles
from q4jax.ops import registry
from tests.support.executed_calls import ROUNDINGS, check_gradient, check_vmap
from tests.support.gpu.aot import compiles_triton
from tests.support.kernel_checks import check
from tests.support.kernel_matrix import Case, cases
from tests.support.ptx.faults import Unknown
from tests.support.ptx.launches import Executor
from tests.support.ptx.machine import TilesThatOverlap

pytestmark = compiles_triton()

# GPU -> its share of `--executed`.
SHARES = {"sm_80": 1 / 8, "sm_90": 1 / 12, "sm_89": 1 / 40}
TRITON = registry.IMPLEMENTATIONS["triton"]
CASES = [case for case in cases() if case.operation.startswith("linear")]


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
    check_vmap(executor, "triton", batched)


def test_gradient(executor):
    check_gradient(executor, "triton")


def test_what_is_not_executed_for_sm_100():
    """The limit of the machine, which does not know Blackwell's tensor cores."""
    case = next(c for c in CASES if c.dtype == "bfloat16" and c.operation == "linear")
    with pytest.raises(Unknown, match="tcgen05"):
        check(case, functools.partial(call, Executor("sm_100", TilesThatOverlap)), ROUNDINGS)
