"""The arithmetic that decides codes, scales and weights on a GPU is IEEE's: read from the PTX.

Needs the extra `aot`.
"""

import functools

import pytest

from tests.support.gpu.aot import needs_aot, run_compiler

pytestmark = needs_aot()

GPUS = ["sm_80", "sm_90"]
# Modifiers of a division and a reciprocal that are off in the last bit, and of arithmetic that
# takes subnormal numbers for zero.
NOT_IEEE = {"approx", "full", "ftz"}


@functools.cache
def report(gpu):
    """A public call -> instruction -> how often."""
    return run_compiler("public_calls", gpu)


@pytest.fixture(params=[pytest.param(g, marks=pytest.mark.xdist_group(g)) for g in GPUS])
def calls(request):
    return dict(report(request.param))


def deviations(instructions):
    return {name for name in instructions if NOT_IEEE & set(name.split("."))}


def test_no_call_computes_approximately(calls):
    assert deviations(calls.pop("control")) == {"div.full.f32", "rcp.approx.f32"}
    found = {name: deviations(instructions) for name, instructions in calls.items()}
    assert not any(found.values()), {name: bad for name, bad in found.items() if bad}


def test_every_call_is_there(calls):
    operations = ("quantize", "dequantize", "matmul", "matmul-gradients")
    for quant_type in ("nf4", "fp4"):
        for scales in ("plain", "nested"):
            for operation in operations:
                for implementation in (None, "xla", "pallas"):
                    assert calls[f"{operation}-{implementation}-{quant_type}-{scales}"]


def test_nothing_is_contracted(calls):
    """Codes and weights are rounded after each operation: no product is fused into a sum."""
    decoding = ("quantize", "dequantize", "take_rows")
    names = [name for name in calls if name.startswith(decoding)]
    assert len(names) >= 40
    found = {name: [i for i in calls[name] if i.startswith(("fma", "mad.rn"))] for name in names}
    assert not any(found.values()), found


def test_the_kernel_divides_by_inline_ptx(calls):
    for quant_type in ("nf4", "fp4"):
        instructions = calls[f"quantize-pallas-{quant_type}-plain"]
        assert instructions["rcp.rn.f32"] and instructions["div.rn.f32"]
