"""Loads, stores and asynchronous copies, and what they must not do."""

import numpy as np
import pytest

from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.global_memory import OverlappingResults
from tests.support.ptx.instructions.table import TABLE
from tests.support.ptx.launches import execute
from tests.support.ptx.machine import Launch, Machine
from tests.support.ptx.parser import parse
from tests.support.ptx.programs import run
from tests.support.ptx.scalar_types import bits_of

LOADS = sorted(opcode for opcode, _ in TABLE if opcode.startswith(("ld.global", "ld.shared")))
STORES = [opcode.replace("ld", "st", 1) for opcode in LOADS if ".ca" not in opcode]
STORES += [opcode.replace(".global", "") for opcode in STORES if ".global" in opcode]
PARAMETERS = {"ld.param.b32", "ld.param.b64", "ld.param.u64", "ld.param::entry.b64"}
SHARED = "mov.b64 %d0, dynamic; mul.wide.u32 %d1, %t, 16; add.s64 %d0, %d0, %d1;\n"  # 16 bytes each
GLOBAL = "mul.wide.u32 %d1, %i, 16; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1;\n"


def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def shape_of(opcode):
    """The number of elements, and their type."""
    words = opcode.split(".")
    return {"v2": 2, "v4": 4}.get(words[-2], 1), words[-1]


def test_every_form_is_tested():
    opcodes = {opcode for opcode, _ in TABLE if opcode[:3] in ("ld.", "st.")}
    assert opcodes - {*LOADS, *STORES} == PARAMETERS


@pytest.mark.parametrize("opcode", LOADS)
def test_loads(opcode):
    """Each element comes into a register of 32 or 64 bits, extended by its sign or by zeros."""
    length, kind = shape_of(opcode)
    data = random_bytes(32, 16)
    wide = 64 if bits_of(kind) == 64 else 32
    names = [f"%{'d' if wide == 64 else 'r'}{i + 4}" for i in range(length)]
    vector = f"{{{', '.join(names)}}}"
    body = SHARED + GLOBAL
    address = "%d2"
    if "shared" in opcode:
        body += "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%d2];\n"
        body += "st.shared.v4.b32 [%d0], {%r20, %r21, %r22, %r23};\n"
        if bits_of(kind) < 32:  # the watched grain is as small as the access
            body += "ld.shared.b8 %r20, [%d0];\n"
        address = "%d0"
    body += f"{opcode} {vector}, [{address}];\n"
    body += f"mul.wide.u32 %d1, %i, {length * wide // 8}; add.s64 %d3, %a1, %d1;\n"
    for i, name in enumerate(names):
        body += f"st.global.b{wide} [%d3+{i * wide // 8}], {name};\n"
    [found] = run(body, [data], [((32, length), f"u{wide // 8}")], shared=512)
    letter = "i" if kind[0] == "s" else "u"
    elements = data.view(f"{letter}{bits_of(kind) // 8}")[:, :length]
    expected = elements.astype(f"{letter}{wide // 8}").view(f"u{wide // 8}")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("opcode", STORES)
def test_stores(opcode):
    """The low bits of registers go where they are sent, and nowhere else."""
    length, kind = shape_of(opcode)
    size = length * bits_of(kind) // 8
    data = random_bytes(32, 16)
    body = SHARED + GLOBAL
    if bits_of(kind) == 64:
        names = [f"%d{i + 4}" for i in range(length)]
        body += "".join(f"ld.global.b64 {n}, [%d2+{8 * i}];\n" for i, n in enumerate(names))
    else:
        names = [f"%r{i + 4}" for i in range(length)]
        body += "".join(f"ld.global.b32 {n}, [%d2+{4 * i}];\n" for i, n in enumerate(names))
    vector = f"{{{', '.join(names)}}}"
    if "shared" in opcode:
        body += f"{opcode} [%d0], {vector};\n"
        for i in range(size):
            body += f"ld.shared.b8 %r20, [%d0+{i}]; mul.wide.u32 %d1, %i, {size};\n"
            body += f"add.s64 %d3, %a1, %d1; st.global.b8 [%d3+{i}], %r20;\n"
    else:
        body += f"mul.wide.u32 %d1, %i, {size}; add.s64 %d3, %a1, %d1;\n"
        body += f"{opcode} [%d3], {vector};\n"
    [found] = run(body, [data], [((32, size), "u1")], shared=512)
    registers = data.view("u8" if bits_of(kind) == 64 else "u4")[:, :length]
    expected = np.ascontiguousarray(registers.astype(f"u{bits_of(kind) // 8}")).view(np.uint8)
    np.testing.assert_array_equal(found, expected)


def test_a_store_that_names_no_space():
    """Shared memory has other addresses there, which this machine does not know."""
    with pytest.raises(Unknown, match="another space"):
        run(SHARED + "mov.b32 %r1, 0; st.b32 [%d0], %r1;\n", shared=512)


COPY = SHARED + GLOBAL + "cp.async.{how}.shared.global [%d0], [%d2], {size}{choice};\n"
READ_BACK = """
ld.shared.b32 %r1, [%d0]; st.global.b32 [%d3], %r1;
ld.shared.b32 %r1, [%d0+4]; st.global.b32 [%d3+4], %r1;
ld.shared.b32 %r1, [%d0+8]; st.global.b32 [%d3+8], %r1;
ld.shared.b32 %r1, [%d0+12]; st.global.b32 [%d3+12], %r1;
"""
RESULT = [((32, 16), "u1")]


def copy(how="cg", size=16, choice="", after="cp.async.commit_group; cp.async.wait_group 0;\n"):
    zeros = "mov.b32 %r9, 0; st.shared.v4.b32 [%d0], {%r9, %r9, %r9, %r9};\n"
    body = SHARED + zeros + COPY.format(how=how, size=size, choice=choice) + after + READ_BACK
    data = random_bytes(32, 16)
    [found] = run(body, [data], RESULT, shared=512)
    return data, found


@pytest.mark.parametrize(("how", "size"), [("cg", 16), ("ca", 16), ("ca", 8), ("ca", 4)])
def test_copies(how, size):
    data, found = copy(how, size)
    np.testing.assert_array_equal(found[:, :size], data[:, :size])
    assert not found[:, size:].any()


def test_copies_in_no_group():
    data, found = copy(after="cp.async.wait_all;\n")
    np.testing.assert_array_equal(found, data)


@pytest.mark.parametrize("by_predicate", [False, True])
def test_copies_that_ignore_their_source(by_predicate):
    """Zeros; the address may be outside of memory."""
    far = "setp.lt.u32 %p1, %t, 7; selp.b32 %r8, 16, 0, %p1; not.pred %p2, %p1;\n"
    far += "@!%p1 mov.b64 %d2, 0;\n"
    body = SHARED + GLOBAL + far
    body += f"cp.async.cg.shared.global [%d0], [%d2], 16, {'%p2' if by_predicate else '%r8'};\n"
    body += "cp.async.wait_all;\n" + READ_BACK
    data = random_bytes(32, 16)
    [found] = run(body, [data], RESULT, shared=512)
    np.testing.assert_array_equal(found[:7], data[:7])
    assert not found[7:].any()


def test_a_wait_leaves_the_newest_groups():
    """Two groups; one is waited for, and the other must not be touched."""
    second = "add.s64 %d4, %d0, 512; cp.async.cg.shared.global [%d4], [%d2], 16;\n"
    two = COPY.format(how="cg", size=16, choice="") + "cp.async.commit_group;\n" + second
    two += "cp.async.commit_group; cp.async.wait_group 1;\n"
    data = random_bytes(32, 16)
    [found] = run(two + READ_BACK + "cp.async.wait_group 0;\n", [data], RESULT, shared=1024)
    np.testing.assert_array_equal(found, data)
    with pytest.raises(Fault, match="before its wait: ld.shared"):
        run(two + "ld.shared.b32 %r1, [%d4];\n", [data], RESULT, shared=1024)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("ld.shared.b32 %r1, [%d0];\n", "before its wait: ld.shared.b32"),
        ("st.shared.b32 [%d0], %t;\n", "before its wait: st.shared.b32"),
        ("cp.async.wait_group 0; ld.shared.b32 %r1, [%d0];\n", "before its wait: ld.shared.b32"),
        ("cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r1, [%d0];\n", "before"),
    ],
)
def test_copies_that_are_not_waited_for(after, message):
    with pytest.raises(Fault, match=message):
        copy(after=after)


def test_copies_that_outlive_the_launch():
    with pytest.raises(Fault, match="ends with copies that were not waited for"):
        run(COPY.format(how="cg", size=16, choice=""), [random_bytes(32, 16)], RESULT, shared=512)


def test_another_threads_wait_does_not_count():
    after = "cp.async.commit_group; setp.lt.u32 %p1, %t, 16; @%p1 cp.async.wait_group 0;\n"
    with pytest.raises(Fault, match="before its wait"):
        copy(after=after)


@pytest.mark.parametrize(
    "text",
    [
        "cp.async.cg.shared.global [%d0], [%d2], 8;",
        "cp.async.cg.shared.global [%d0], [%d2], 16, 8;",
    ],
)
def test_copies_that_are_unknown(text):
    with pytest.raises(Unknown, match="a copy of"):
        run(SHARED + GLOBAL + text, [random_bytes(32, 16)], RESULT, shared=512)


BAD = {
    "read behind": ("ld.global.b32 %r1, [%d2+16];", "read of 4 bytes outside, at 512 of array 0"),
    "read before": ("ld.global.b32 %r1, [%d2+-4];", "read of 4 bytes outside"),
    "read a result": ("ld.global.b32 %r1, [%d3];", "read of 4 bytes outside, at 0 of array 1"),
    "write an operand": ("st.global.b32 [%d2], %t;", "write of 4 bytes outside, at 0 of array 0"),
    "write behind": ("st.global.v4.b32 [%d3+8], {%t, %t, %t, %t};", "misaligned access of 16"),
    "misaligned": ("ld.global.b32 %r1, [%d2+2];", "misaligned access of 4 bytes"),
    "misaligned vector": ("ld.global.v2.b32 {%r1, %r2}, [%d2+4];", "misaligned access of 8 bytes"),
    "cut address": (
        "cvt.u32.u64 %r1, %d2; cvt.u64.u32 %d4, %r1; ld.global.b32 %r1, [%d4];",
        "outside",
    ),
    "shared behind": ("st.shared.b32 [%d0+512], %t;", "outside of shared memory"),
    "shared before": ("st.shared.b32 [%d0+-1024], %t;", "outside of shared memory"),
    "shared misaligned": ("st.shared.b64 [%d0+4], %d0;", "misaligned access to shared memory"),
    "unwritten": ("ld.shared.b32 %r1, [%d0];", "a read of shared memory that nothing wrote"),
    "same byte twice": ("st.global.b8 [%a1], %t;", "two threads write the same byte"),
    "a register": ("add.s32 %r1, %r2, 1;", "%r2 is read before it is written"),
    "a predicate": ("@%p1 add.s32 %r1, %t, 1;", "%p1 is read before it is written"),
    "a part of a register": (
        "setp.lt.u32 %p1, %t, 5; @%p1 mov.b32 %r1, 1; st.global.b32 [%d3], %r1;",
        "%r1 is read before it is written",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_faults(name):
    text, message = BAD[name]
    with pytest.raises(Fault, match=message) as error:
        run(SHARED + GLOBAL + text, [random_bytes(32, 16)], RESULT, shared=512)
    assert "\n" not in str(error.value)


def test_a_byte_that_is_not_written():
    text = "mov.b32 %r1, 0; st.global.v2.b32 [%d3], {%r1, %r1}; st.global.b32 [%d3+8], %r1;"
    text += "setp.lt.u32 %p1, %t, 31; @%p1 st.global.b32 [%d3+12], %r1;"
    with pytest.raises(Fault, match="4 bytes of result 0 are not written, the first at 508"):
        run(SHARED + GLOBAL + text, [random_bytes(32, 16)], RESULT)


def test_bytes_of_threads_that_did_not_run():
    """A register that some threads wrote may be used by these."""
    text = "setp.lt.u32 %p1, %t, 5; @%p1 mov.b32 %r1, 7; @!%p1 mov.b32 %r1, 8;"
    text += "mul.wide.u32 %d1, %i, 4; add.s64 %d3, %a0, %d1; st.global.b32 [%d3], %r1;"
    [found] = run(text, [], [((32,), "u4")])
    np.testing.assert_array_equal(found, np.where(np.arange(32) < 5, 7, 8))


def test_results_that_overlap():
    """Tiles at the end of an array may compute again what others have, the same."""
    memory = OverlappingResults([], [np.empty(4, "u4")], [16])
    first, threads = memory.address(0), np.arange(2)
    at = np.full(2, first + 4, np.uint64)
    same, other = np.full((2, 4), 7, np.uint8), np.array([[7] * 4, [8] * 4], np.uint8)
    memory.store(at, same, threads)
    memory.store(at, same, threads + 2)
    with pytest.raises(Fault, match="two threads write other values"):
        memory.store(at[:1], other[1:], threads[:1])
    with pytest.raises(Fault, match="two threads write other values"):
        memory.store(at + np.uint64(4), other, threads)


def test_parameters_that_are_no_arrays():
    text = """
.version 8.8
.target sm_80
.address_size 64
.file 1 "kernel.py"
.visible .entry test(.param .u64 .ptr .global .align 1 a, .param .u32 b, .param .u64 c)
.reqntid 32
{
  .reg .b32 %r<4>; .reg .b64 %d<2>;
  .loc 1 7 0, function_name $name, inlined_at 1 2 3
  ld.param.b64 %d1, [a];
  ld.param.b32 %r1, [b];
  mov.b64 {%r2, _}, %d1;
  st.global.b32 [%d1], %r1;
  ret;
}
.section .debug_abbrev { .b8 1 }
"""
    launch = Launch((1, 1, 1), 32, 0, scalars={1: 2**32 - 5, 2: 0}, alignment=16)
    with pytest.raises(Fault, match="two threads write"):
        execute(text, launch, [], [np.empty(1, "i4")])

    class Shared(Machine):
        global_memory = OverlappingResults

    machine = Shared(parse(text), launch, [], [np.empty(1, "i4")]).run()
    assert machine.memory.result(0).tolist() == [-5]
    assert machine.memory.address(0) % 16 == 0
    with pytest.raises(Unknown, match="3 parameters, 1 of them scalars"):
        Machine(parse(text), Launch((1, 1, 1), 32, 0, scalars={1: 5}), [], [np.empty(1, "i4")])
