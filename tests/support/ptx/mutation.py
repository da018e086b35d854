"""Which altered kernels nothing notices: `python -m tests.support.ptx.mutation sm_80 linear 250`.

An alteration is noticed where the machine faults, or where a result differs: in any bit for
quantize and dequantize, by more than its bound for a product.
"""

import collections
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec
from q4jax.ops import registry
from tests.support import oracle
from tests.support.kernel_checks import odd_input, weight_of
from tests.support.kernel_matrix import Case
from tests.support.products import assert_product
from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.launches import Executed, Executor
from tests.support.ptx.machine import Machine
from tests.support.ptx.mutants import Mutant, mutants
from tests.support.ptx.parser import Kernel, parse
from tests.support.random_arrays import normal

# Rows and columns that fill no tile, and more steps than the software pipeline has stages.
CASES = {
    "quantize": Case("quantize", "float32", "nf4", 64, False, 0, 0),
    "dequantize": Case("dequantize", "bfloat16", "nf4", 64, True, 257, 64),
    "linear": Case("linear", "bfloat16", "nf4", 64, True, 65, 448, m=15, bias=True),
    "linear_transpose": Case("linear_transpose", "bfloat16", "nf4", 64, True, 321, 320, m=15),
}


def hard_to_quantize() -> jax.Array:
    """Blocks in which each place has each threshold and its neighbours, the ends of the normal
    numbers, and numbers so large that they are divided."""
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
    odd = np.asarray(odd_input("float32")[:768]).reshape(12, 64)
    # The last program has one block; the others have blocks of all sorts.
    normal = rng.standard_normal((53, 64), np.float32)
    rows = np.concatenate([rows, small, large, edge, odd, normal])
    assert len(rows) % 64 == 1
    return jnp.asarray(rng.permutation(rows))


def launch_of(gpu: str, name: str) -> tuple[Executed, Callable[[Any], None]]:
    """A launch that has run, and a check of its first result, or of all for quantize."""
    case, executor = CASES[name], Executor(gpu)
    run = getattr(registry.IMPLEMENTATIONS["pallas"], name)
    if name == "quantize":
        w = hard_to_quantize()
        executor(
            functools.partial(run, spec=QuantSpec.from_shape(w.shape, w.dtype, "nf4", 64, False)), w
        )
    elif name == "dequantize":
        weight, _ = weight_of(case)
        spec = weight.quant_state.spec
        executor(functools.partial(run, spec=spec, dtype=spec.dtype), weight.arrays)
    else:
        weight, w = weight_of(case)
        operand = normal(1, case.m, case.k if name == "linear" else case.n, dtype=case.dtype)
        bias = [normal(2, case.n)] if name == "linear" else []
        executor(
            functools.partial(run, spec=weight.quant_state.spec), operand, weight.arrays, *bias
        )
    [launch] = executor.launches

    def check(results):
        if name in ("quantize", "dequantize"):
            for found, expected in zip(results, launch.results, strict=True):
                assert oracle.same_bits(found, expected)
            return
        [found] = results
        assert len(found) == 1  # not split
        found = jnp.asarray(found.reshape(case.m, -1))
        assert_product(found, operand, w if name == "linear" else w.T, *bias, roundings=16)

    check(launch.results)
    return launch, check


def noticed(
    kernel: Kernel, launch: Executed, check: Callable[[Any], None], limit: int
) -> str | None:
    """By what an altered kernel is noticed, or None; "" if the machine cannot run it."""
    try:
        machine = Machine(kernel, launch.launch, launch.operands, launch.results).run(limit)
        check([machine.memory.result(number) for number in range(len(launch.results))])
    except Unknown:
        return ""
    except Fault as fault:
        return str(fault).rpartition(": ")[0] or str(fault)
    except AssertionError:
        return "the result"
    return None


def survivors(gpu: str, name: str, count: int) -> tuple[collections.Counter, list[Mutant]]:
    """How often which check noticed one of `count` mutants, and those that none did."""
    launch, check = launch_of(gpu, name)
    kernel = parse(launch.ptx)
    executed = Machine(kernel, launch.launch, launch.operands, launch.results).run().executed
    tally: collections.Counter = collections.Counter()
    found = []
    for mutant in mutants(kernel):
        by = noticed(mutant.kernel, launch, check, 2 * executed)
        if by == "":
            continue
        tally[by] += 1
        found += [mutant] if by is None else []
        if tally.total() == count:
            break
    return tally, found


if __name__ == "__main__":
    gpu, name, count = sys.argv[1:]
    tally, found = survivors(gpu, name, int(count))
    for by, times in tally.most_common():
        print(f"{times:5d} {by}")
    print(*found, sep="\n")
