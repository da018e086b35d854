"""Which altered kernels nothing notices: `python -m tests.support.ptx.mutation CALL GPU COUNT`.

CALL is a key of `CALLS`, such as "pallas-linear". An alteration is noticed where the machine
faults, or where a result of the call differs: in any bit for quantize and dequantize, by more than
its bound for a product.
"""

import collections
import functools
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec
from q4jax.ops import registry
from tests.support import oracle
from tests.support.executed_calls import ROUNDINGS
from tests.support.kernel_checks import odd_input, weight_of
from tests.support.kernel_matrix import Case
from tests.support.products import assert_product
from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.launches import Executor
from tests.support.ptx.machine import Machine, TilesThatOverlap
from tests.support.ptx.mutants import Mutant, mutants
from tests.support.ptx.parser import Kernel, parse
from tests.support.random_arrays import normal

_LINEAR = Case("linear", "bfloat16", "nf4", 64, True, 129, 448, m=15, bias=True)
_TRANSPOSE = Case("linear_transpose", "bfloat16", "nf4", 64, True, 321, 320, m=15)
# Rows and columns that fill no tile, and more steps than the software pipeline has stages.
CALLS = {
    "pallas-quantize": Case("quantize", "float32", "nf4", 64, False, 0, 0),
    "pallas-dequantize": Case("dequantize", "bfloat16", "nf4", 64, True, 257, 64),
    "pallas-linear": _LINEAR,
    "pallas-linear_transpose": _TRANSPOSE,
    "triton-linear": _LINEAR,
    "triton-linear_transpose": _TRANSPOSE,
    "mosaic_gpu-linear": Case("linear", "bfloat16", "nf4", 64, True, 72, 1536, m=15, bias=True),
    # Of two warp groups.
    "mosaic_gpu-linear-127": Case(
        "linear", "bfloat16", "nf4", 64, True, 136, 768, m=127, bias=True
    ),
    "mosaic_gpu-linear_transpose": Case(
        "linear_transpose", "bfloat16", "nf4", 64, True, 328, 512, m=20
    ),
}
# Alterations that change nothing in kernels of several front ends; see `assert_noticed`.
JOINED_COPIES = (
    r"deleted: cp\.async\.commit_group",
    5,
    "the copies, before the loop, join a group of one wait",
)
ZERO_TO_SUBNORMAL = (
    r"to add\S+: mul\.rn\.f32 .* 0f00000000",
    4,
    "a weight of 0 becomes a subnormal number",
)
_MACHINES = {"pallas": Machine, "triton": TilesThatOverlap, "mosaic_gpu": Machine}


def hard_to_quantize() -> jax.Array:
    """Blocks in which each place has each threshold and its neighbours, the ends of the normal
    numbers, and numbers so large that they are divided, or almost; and blocks of zeros."""
    rng, one = np.random.default_rng(0), np.float32(1)
    at = codebooks.CODEBOOKS["nf4"].thresholds
    near = np.concatenate([at, np.nextafter(at, 2 * one), np.nextafter(at, -2 * one)])
    rows = np.stack([rng.permutation(np.resize(near, 64)) for _ in range(256)])
    rows[np.arange(256), rng.integers(0, 64, 256)] = 1
    tiny = np.finfo(np.float32).smallest_normal
    ends = np.float32([tiny, np.nextafter(tiny, 0 * one), tiny / 2, 0])
    small = rng.choice(np.concatenate([ends, -ends]), (192, 64))
    small[np.arange(64), rng.integers(0, 64, 64)] = 2 * tiny
    large = np.clip(rng.standard_normal((64, 64), np.float32), -3, 3) * np.float32(2.0**126)
    edge = rows[:64] * np.nextafter(np.float32(2.0**126), np.float32(np.inf))
    below = rows[64:128] * np.float32(0.75 * 2.0**126)
    odd = np.asarray(odd_input("float32")[:768]).reshape(12, 64)
    # The last program has one block; the others have blocks of all sorts.
    normal = rng.standard_normal((53, 64), np.float32)
    rows = np.concatenate([rows, small, large, edge, below, np.zeros((64, 64)), odd, normal])
    assert len(rows) % 64 == 1
    return jnp.asarray(rng.permutation(rows))


class Trial(Executor):
    """A call of one launch, which is made again and again with altered kernels.

    Attributes:
      kernel: the launch's, unaltered.
      limit: of the instructions of an altered one.

    Args:
      call: a key of `CALLS`.
      gpu: what it is compiled for.
    """

    def __init__(self, call: str, gpu: str):
        self.implementation, *_ = call.split("-")
        super().__init__(gpu, _MACHINES[self.implementation])
        self._instead: Kernel | None = None
        self.limit = 10_000_000
        self._call, self._check = self._call_of(CALLS[call])
        self._expected = self(*self._call)
        self._check(self._expected)
        [launch] = self.launches
        self.kernel = parse(launch.ptx)
        assert self.noticed(self.kernel) is None
        self.limit = 2 * self._executed

    def noticed(self, kernel: Kernel) -> str | None:
        """By what another kernel is noticed, or None; "" if the machine cannot run it."""
        self._instead = kernel
        try:
            self._check(self(*self._call))
        except Unknown:
            return ""
        except Fault as fault:
            return str(fault).rpartition(": ")[0] or str(fault)
        except AssertionError:
            return "the result"
        return None

    def launch(self, equation: Any, operands: list[Any]) -> list[Any]:
        """The results of the kernel that is tried."""
        if self._instead is None:
            return super().launch(equation, operands)
        [done] = self.launches
        machine = self.machine(self._instead, done.launch, done.operands, done.results)
        self._executed = machine.run(self.limit).executed
        return [jnp.asarray(machine.memory.result(i)) for i in range(len(done.results))]

    def _call_of(self, case: Case) -> tuple[tuple[Any, ...], Callable[[Any], None]]:
        """A function with its arguments, and a check of what it returns."""
        run = getattr(registry.IMPLEMENTATIONS[self.implementation], case.operation)
        if case.operation == "quantize":
            w = hard_to_quantize()
            spec = QuantSpec.from_shape(w.shape, w.dtype, case.quant_type, case.blocksize, False)
            return (functools.partial(run, spec=spec), w), self._check_bits
        weight, w = weight_of(case)
        spec = weight.quant_state.spec
        if case.operation == "dequantize":
            run = functools.partial(run, spec=spec, dtype=spec.dtype)
            return (run, weight.arrays), self._check_bits
        linear = case.operation == "linear"
        operand = normal(1, case.m, case.k if linear else case.n, dtype=case.dtype)
        bias = [normal(2, case.n)] if case.bias else []

        def check(found: Any) -> None:
            assert_product(found, operand, w if linear else w.T, *bias, roundings=ROUNDINGS)

        return (functools.partial(run, spec=spec), operand, weight.arrays, *bias), check

    def _check_bits(self, found: Any) -> None:
        for one, other in zip(*map(jax.tree.leaves, (found, self._expected)), strict=True):
            assert oracle.same_bits(one, other)


def survivors(call: str, gpu: str, count: int) -> tuple[collections.Counter, list[Mutant]]:
    """How often which check noticed one of `count` mutants, and those that none did."""
    trial = Trial(call, gpu)
    tally: collections.Counter = collections.Counter()
    found = []
    for mutant in mutants(trial.kernel):
        by = trial.noticed(mutant.kernel)
        if by == "":
            continue
        tally[by] += 1
        found += [mutant] if by is None else []
        if tally.total() == count:
            break
    return tally, found


def assert_noticed(
    call: str, gpu: str, count: int, harmless: Iterable[tuple[str, int, str]]
) -> None:
    """Assert that each of `count` mutants is noticed, or explained.

    Args:
      call, gpu, count: see `survivors`.
      harmless: a pattern, how many of a kernel's mutants it explains, and why they change nothing.
    """
    tally, found = survivors(call, gpu, count)
    assert tally.total() == count
    left = {pattern: most for pattern, most, _ in harmless}
    unexplained = []
    for mutant in found:
        text = f"{mutant.what}: {mutant.instruction.text}"
        pattern = next((p for p in left if re.match(p, text)), None)
        if pattern is None or not left[pattern]:
            unexplained.append(str(mutant))
        else:
            left[pattern] -= 1
    assert not unexplained
    assert len(found) <= count / 4


if __name__ == "__main__":
    call, gpu, count = sys.argv[1:]
    tally, found = survivors(call, gpu, int(count))
    for by, times in tally.most_common():
        print(f"{times:5d} {by}")
    print(*found, sep="\n")
