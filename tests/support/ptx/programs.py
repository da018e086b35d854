"""Small programs for the tests of the machine."""

import numpy as np

from tests.support.ptx.launches import execute
from tests.support.ptx.machine import Launch
from tests.support.ptx.scalar_types import bits_of

_MODULE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry test({parameters})
.reqntid {threads}, 1, 1
{{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<300>;
  .reg .b64 %d<16>, %a<8>;
  .reg .b32 %t, %i;
  mov.u32 %t, %tid.x;
  mov.u32 %i, %ctaid.x;
  mad.lo.s32 %i, %i, {threads}, %t;
{body}
  ret;
}}
"""
_REGISTERS = {1: "%p", 8: "%r", 16: "%h", 32: "%r", 64: "%d"}


def module(body, count, threads):
    """The text of a kernel with `count` arrays and a body as `run` takes it."""
    parameters = ", ".join(f".param .u64 .ptr .align 32 test_param_{i}" for i in range(count))
    loads = "".join(f"  ld.param.b64 %a{i}, [test_param_{i}];\n" for i in range(count))
    return _MODULE.format(parameters=parameters, threads=threads, body=loads + body)


def run(body, operands=(), results=(), threads=32, blocks=1, shared=0, limit=100_000):
    """Run a body and return a list of its results.

    In the body %t is the thread of the block, %i the one of the launch, and %a0, %a1, ... are the
    addresses of operands and results.
    """
    operands = [np.asarray(operand) for operand in operands]
    results = [np.empty(*result) for result in results]
    text = module(body, len(operands) + len(results), threads)
    return execute(text, Launch((blocks, 1, 1), threads, shared), operands, results, limit=limit)


def element(array, kind, register):
    """Statements that load a thread's element of an array into a register."""
    size = max(1, bits_of(kind) // 8)
    address = f"mul.wide.u32 %d8, %i, {size}; add.s64 %d9, %a{array}, %d8;\n"
    if kind == "pred":
        return f"{address} ld.global.u8 %h7, [%d9]; setp.ne.u16 {register}, %h7, 0;\n"
    return f"{address} ld.global.b{8 * size} {register}, [%d9];\n"


def apply(opcode, result, sources, *arrays, operands=None):
    """The results of an instruction on a thread's element of each array.

    Args:
      opcode: the instruction.
      result, sources: types; the result is as wide as its register.
      *arrays: unsigned integers, the bits of the sources.
      operands: the text after the target, where it is not the sources.
    """
    registers = [f"{_REGISTERS[bits_of(kind)]}{i + 1}" for i, kind in enumerate(sources)]
    body = "".join(
        element(i, kind, register)
        for i, (kind, register) in enumerate(zip(sources, registers, strict=True))
    )
    target = f"{_REGISTERS[bits_of(result)]}6"
    body += f"{opcode} {target}, {operands or ', '.join(registers)};\n"
    if result == "pred":
        body += "selp.b32 %r6, 1, 0, %p6;\n"
    width = max(32, bits_of(result)) if bits_of(result) != 16 else 16
    register = "%r6" if width == 32 else target
    body += f"mul.wide.u32 %d8, %i, {width // 8}; add.s64 %d9, %a{len(arrays)}, %d8;\n"
    body += f"st.global.b{width} [%d9], {register};\n"
    [found] = run(body, arrays, [(len(arrays[0]), f"u{width // 8}")], blocks=len(arrays[0]) // 32)
    return found
