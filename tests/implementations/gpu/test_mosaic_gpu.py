"""The kernels of "mosaic_gpu" for Hopper, compiled and executed as PTX. Needs the extra `aot`."""

import functools
import itertools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.ops import registry
from tests.support.gpu.aot import needs_aot
from tests.support.gpu.ptxas import assemble
from tests.support.kernel_checks import check
from tests.support.kernel_matrix import Case
from tests.support.products import assert_product
from tests.support.ptx.counters import CountingMachine
from tests.support.ptx.faults import Fault
from tests.support.ptx.launches import Executor, execute
from tests.support.random_arrays import decoded, normal, random_weight

pytestmark = needs_aot("triton")

MOSAIC = registry.IMPLEMENTATIONS["mosaic_gpu"]
ROUNDINGS = 16  # of sums that are split over programs
SHARE = 1 / 24  # of `--executed`
BLOCKSIZES = (32, 64, 128, 256, 1024, 4096)
# Rows of x below and at a tile, and two tiles; rows of W below, above and at one.
SIZES = [(1, 72), (7, 8), (16, 64), (20, 200), (33, 64), (64, 136), (65, 72), (130, 64), (130, 200)]


def cases():
    """In an order in which any first part is a fair sample."""
    found = []
    settings = itertools.product(("bfloat16", "float16"), ("nf4", "fp4"), BLOCKSIZES, (False, True))
    for (dtype, quant_type, blocksize, nested), (m, n) in itertools.product(settings, SIZES):
        for operation, least in (("linear", 128), ("linear_transpose", 256)):
            k = max(blocksize, least) * (3 if blocksize < 1024 else 1)
            bias = operation == "linear" and m % 2 == 0
            found.append(Case(operation, dtype, quant_type, blocksize, nested, n, k, m, bias))
    random.Random(0).shuffle(found)
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        chosen = cases()[: round(metafunc.config.getoption("--executed") * SHARE)]
        metafunc.parametrize("case", chosen, ids=[case.name for case in chosen])


def call(executor, op, *operands, **static):
    """An op of the implementation."""
    return executor(functools.partial(getattr(MOSAIC, op), **static), *operands)


def test_matrix(case):
    executor = Executor("sm_90")
    check(case, functools.partial(call, executor), ROUNDINGS)
    [launch] = executor.launches
    assert launch.name == f"q4jax_{case.operation}"
    assert ".target sm_90a" in launch.ptx


# K or N that is long enough to be split, with a last share that is shorter.
SPLIT = [
    Case("linear", "bfloat16", "nf4", 64, True, 72, 256 * 9, m=3, bias=True),
    Case("linear_transpose", "float16", "fp4", 32, True, 64 * 8 + 8, 512, m=3),
]


@pytest.mark.parametrize("split", SPLIT, ids=lambda case: case.name)
def test_sums_that_are_split(split):
    executor = Executor("sm_90")
    check(split, functools.partial(call, executor), ROUNDINGS)
    [launch] = executor.launches
    assert launch.results[0].shape[0] == 2


def test_two_warp_groups():
    """No copy goes over what either still reads: neither waits in vain nor for too little."""
    executor = Executor("sm_90")
    case = Case("linear", "bfloat16", "nf4", 64, True, 72, 128 * 4, m=65, bias=True)
    check(case, functools.partial(call, executor), ROUNDINGS)
    [done] = executor.launches
    assert (done.launch.threads, done.launch.grid) == (256, (1, 1, 1))
    *_, wait = re.finditer(r"mbarrier\.try_wait\S* P1, [^;]*;", done.ptx)
    arrival = r"mbarrier\.arrive\.release\.cta[^;]*;"
    waits_for_none = done.ptx[: wait.start()] + "mov.pred P1, 1;" + done.ptx[wait.end() :]
    for ptx, message in [
        (waits_for_none, "a race: a write over what another thread reads"),
        (re.sub(arrival, "", done.ptx), "no end within"),
    ]:
        results = [np.empty_like(result) for result in done.results]
        with pytest.raises(Fault, match=message):
            execute(ptx, done.launch, done.operands, results, limit=4_000)


def test_gradient():
    """Of a public call, mapped over x and the weight: one launch each way."""
    executor = Executor("sm_90")
    many = [random_weight((72, 256), 64, True, dtype="bfloat16", seed=i) for i in range(2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *many)
    x, g = normal(1, 2, 5, 256, dtype="bfloat16"), normal(2, 2, 5, 72, dtype="bfloat16")
    matmul = functools.partial(q4jax.matmul_4bit, implementation="mosaic_gpu")

    def both(x, g, weight):
        y, vjp = jax.vjp(lambda x: jax.vmap(matmul)(x, weight), x)
        return y, *vjp(g)

    y, dx = executor(both, x, g, stack)
    for i, weight in enumerate(many):
        w = decoded(weight)
        assert_product(y[i], x[i], w, roundings=ROUNDINGS)
        assert_product(dx[i], g[i], w.T, roundings=ROUNDINGS)
    assert [e.name for e in executor.launches] == ["q4jax_linear", "q4jax_linear_transpose"]


@pytest.mark.parametrize(("m", "n", "nested"), [(5, 72, True), (65, 72, False)])
def test_a_weight_of_a_stack(m, n, nested):
    """It is read in its place, also where a tile has rows of the next weight or none."""
    many = [random_weight((n, 256), 64, nested, seed=i, dtype="bfloat16") for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *many)
    x, g = normal(1, m, 256, dtype="bfloat16"), normal(2, m, n, dtype="bfloat16")

    def both(x, g, number):
        weight = q4jax.weight_of_stack(stack, number)
        y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight, implementation="mosaic_gpu"), x)
        return y, *vjp(g)

    for number in (1, 7):  # clipped
        executor = Executor("sm_90")
        y, dx = executor(both, x, g, jnp.int32(number))
        w = decoded(many[min(number, 2)])
        assert_product(y, x, w, roundings=ROUNDINGS)
        assert_product(dx, g, w.T, roundings=ROUNDINGS)
        assert [e.operands[0].shape for e in executor.launches] == 2 * [(3 * n, 32)]


def test_a_weight_of_a_stack_with_its_own_scales():
    """As a device has them whose part of a stack is some of each weight's rows."""
    weight, other = (random_weight((72, 256), 64, False, "fp4", "float16", i) for i in range(2))
    packed = jnp.stack([other.packed, weight.packed])
    arrays = ArraysInStack(weight.arrays._replace(packed=packed), (jnp.int32(1),))
    x = normal(1, 3, 256, dtype="float16")
    y = call(Executor("sm_90"), "linear", x, arrays, None, spec=weight.quant_state.spec)
    assert_product(y, x, decoded(weight), roundings=ROUNDINGS)


def test_scales_that_are_not_finite():
    """They reach the rows of their blocks and nothing else."""
    weight = random_weight((64, 256), 64, False, dtype="bfloat16")
    absmax = np.array(weight.quant_state.absmax)
    absmax[0, 0], absmax[1, 1] = np.nan, np.inf
    arrays, spec = weight.arrays._replace(absmax=jnp.asarray(absmax)), weight.quant_state.spec
    x = normal(1, 8, 256, dtype="bfloat16")
    y = np.array(call(Executor("sm_90"), "linear", x, arrays, None, spec=spec))
    assert not np.isfinite(y[:, :2].astype(np.float32)).any()
    assert_product(y[:, 2:], x, decoded(weight)[2:], roundings=ROUNDINGS)


# Operation and M -> registers; wavefronts of shared memory, ALU instructions and issue slots a
# weight; rows and columns of W a step. docs/gpu.md has them.
LIMITS = {
    ("linear", 1): (104, 0.0127, 2.42, 4.11, 64, 256),
    ("linear", 16): (108, 0.0167, 2.45, 4.18, 64, 256),
    ("linear", 64): (128, 0.0401, 2.45, 4.60, 64, 256),
    ("linear", 256): (128, 0.0567, 2.89, 5.82, 128, 128),
    ("linear_transpose", 16): (232, 0.0186, 2.66, 4.85, 64, 512),
    ("linear_transpose", 64): (224, 0.0337, 3.18, 6.08, 64, 256),
}
ROOM = 1.05  # for another release of the compiler
ALU = ("PRMT", "SHF", "LOP3", "F2FP", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "PLOP3", "MOV.")
STEPS = 3  # so few that no sum is split


@pytest.mark.parametrize(("operation", "m"), LIMITS)
def test_what_a_weight_asks_for(operation, m):
    """In one program. Shared memory is touched in its loop only."""
    registers, *limits, rows, columns = LIMITS[operation, m]
    linear = operation == "linear"
    shape = (rows, columns * STEPS) if linear else (rows * STEPS, columns)
    weight = random_weight(shape, 64, False, dtype="bfloat16")
    x = normal(1, m, shape[linear], dtype="bfloat16")
    operands = (x, weight.arrays, None) if linear else (x, weight.arrays)
    executor = Executor("sm_90", CountingMachine)
    call(executor, operation, *operands, spec=weight.quant_state.spec)
    [launch] = executor.launches
    kernel, said = assemble(launch.ptx)
    assert not re.search(r"\.approx|\.full|\.ftz|\bfma\.", launch.ptx)
    assert "erialized" not in said  # products that wait for each other
    assert (kernel.stack, kernel.local) == (0, 0)
    assert kernel.registers <= registers
    assert kernel.count("HGMMA", "loop")
    counts = (launch.counts[name] for name in ("load", "store", "copy", "wgmma"))
    threads = launch.launch.threads
    found = (
        sum(counts) / (rows * columns * STEPS * np.prod(launch.launch.grid)),
        sum(kernel.count(name, "loop") for name in ALU) * threads / (rows * columns),
        sum(kernel.loop.values()) * threads / (rows * columns),
    )
    assert all(f <= ROOM * limit for f, limit in zip(found, limits, strict=True)), found
