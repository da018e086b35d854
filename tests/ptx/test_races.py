"""Races in shared memory, and barriers."""

import itertools

import numpy as np
import pytest

from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.programs import run

# %d0: a thread's own word. %d2: its neighbour's, in the same warp; %d4: one in another warp.
OWN = """
mov.b64 %d6, dynamic; mul.wide.u32 %d1, %t, 4; add.s64 %d0, %d6, %d1;
xor.b32 %r1, %t, 1; mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d6, %d1;
xor.b32 %r1, %t, 32; mul.wide.u32 %d1, %r1, 4; add.s64 %d4, %d6, %d1;
mul.wide.u32 %d1, %i, 4; add.s64 %d5, %a0, %d1;
"""
WRITE, BARRIER = "st.shared.b32 [%d0], %t;\n", "bar.sync 0;\n"
RESULT = [((128,), "u4")]


def go(*parts):
    [found] = run(OWN + "".join(parts), [], RESULT, threads=64, blocks=2, shared=256)
    return found


def output(register="%r2"):
    return f"st.global.b32 [%d5], {register};\n"


@pytest.mark.parametrize(("address", "bit"), [("%d0", 0), ("%d2", 1), ("%d4", 32)])
def test_through_a_barrier(address, bit):
    found = go(WRITE, BARRIER, f"ld.shared.b32 %r2, [{address}];\n", output())
    np.testing.assert_array_equal(found, np.tile(np.arange(64) ^ bit, 2))


ACCESS = {"read": "ld.shared.b32 %r2, [{}];\n", "write": "st.shared.b32 [{}], %t;\n"}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ACCESS, ACCESS)))
@pytest.mark.parametrize("other", ["%d2", "%d4"])
def test_two_accesses(first, second, other):
    """Of two threads to one place: they race unless both read or a barrier is between them."""
    start = WRITE + BARRIER
    one, two = ACCESS[first].format("%d0"), ACCESS[second].format(other)
    go(start, one, BARRIER, two, output("%t"))
    if first == second == "read":
        go(start, one, two, output("%t"))
        with pytest.raises(Fault, match="a race: a write over what another thread reads"):
            go(start, one, two, WRITE, output("%t"))
    else:
        with pytest.raises(Fault, match="a race"):
            go(start, one, two, output("%t"))


WARP_BARRIER = "bar.warp.sync -1;\n"


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ACCESS, ACCESS)))
def test_a_barrier_of_a_warp(first, second):
    """It separates accesses of the warp's threads, and of no others."""
    start = WRITE + BARRIER
    one = ACCESS[first].format("%d0")
    go(start, one, WARP_BARRIER, ACCESS[second].format("%d2"), output("%t"))
    if first != "read" or second != "read":
        with pytest.raises(Fault, match="a race"):
            go(start, one, WARP_BARRIER, ACCESS[second].format("%d4"), output("%t"))


def test_reads_of_a_warp():
    """Several threads of one warp read a word, at once or one after the other; one writes it."""
    start = WRITE + BARRIER + "shr.u32 %r3, %t, 5;\n"
    start += "mul.wide.u32 %d1, %r3, 128; add.s64 %d8, %d6, %d1;\n"  # the first word of the warp
    write = "setp.eq.u32 %p1, %laneid, 3; @%p1 st.shared.b32 [%d8], %t;\n"
    read, half = "ld.shared.b32 %r2, [%d8];\n", "setp.lt.u32 %p2, %laneid, 16;\n"
    in_turn = half + "@%p2 " + read + "@!%p2 " + read
    for reads in (read, in_turn, read + WARP_BARRIER + read):
        go(start, reads, WARP_BARRIER, write, output("%t"))
        with pytest.raises(Fault, match="a race: a write over what another"):
            go(start, reads, write, output("%t"))
    # A thread of the other warp has read it, too.
    first = "setp.eq.u32 %p3, %t, 32; @%p3 ld.shared.b32 %r2, [%d6];\n"
    for reads in (first + read, read + first, "ld.shared.b32 %r2, [%d6];\n"):
        with pytest.raises(Fault, match="a race: a write over what another"):
            go(start, reads, WARP_BARRIER, write, output("%t"))
        go(start, reads, BARRIER, write, output("%t"))


def test_one_thread_may_do_as_it_likes():
    go(WRITE, "ld.shared.b32 %r2, [%d0];\n", WRITE, WRITE, output("%t"))


def test_two_threads_in_one_instruction():
    with pytest.raises(Fault, match="two threads write different values"):
        go("st.shared.b32 [%d6], %t;\n", output("%t"))
    go("mov.b32 %r3, 5; st.shared.b32 [%d6], %r3;\n", output("%t"))  # the same value
    with pytest.raises(Fault, match="a race: a write over what another"):
        go(
            "mov.b32 %r3, 5; st.shared.b32 [%d6], %r3;\n",
            BARRIER,
            "ld.shared.b32 %r2, [%d6];\n",
            "setp.eq.u32 %p1, %t, 3; @%p1 st.shared.b32 [%d6], %r3;\n",
            output("%t"),
        )


def test_a_copy_counts_when_its_thread_has_waited():
    copy = "cp.async.ca.shared.global [%d0], [%d7], 4; cp.async.wait_all;\n"
    body = OWN.replace("%a0", "%a1") + "mul.wide.u32 %d1, %i, 4; add.s64 %d7, %a0, %d1;\n" + copy
    data = np.arange(128, dtype=np.uint32)
    read = "ld.shared.b32 %r2, [%d4];\n" + output()
    [found] = run(body + BARRIER + read, [data], RESULT, threads=64, blocks=2, shared=256)
    np.testing.assert_array_equal(found, data ^ 32)
    with pytest.raises(Fault, match="a race: a read of another thread's write"):
        run(body + read, [data], RESULT, threads=64, blocks=2, shared=256)


def test_a_copy_may_write_until_its_wait():
    """Another thread's read in the epoch of the wait races with it, in whichever order."""
    body = OWN.replace("%a0", "%a1") + "mul.wide.u32 %d1, %i, 4; add.s64 %d7, %a0, %d1;\n"
    body += WRITE + BARRIER + "ld.shared.b32 %r2, [%d4];\n"
    body += "cp.async.ca.shared.global [%d0], [%d7], 4; cp.async.wait_all;\n" + output()
    with pytest.raises(Fault, match="a race: a write over what another thread reads"):
        run(body, [np.arange(128, dtype=np.uint32)], RESULT, threads=64, blocks=2, shared=256)


def test_a_barrier_without_some_threads():
    with pytest.raises(Fault, match="a barrier without some of its 64 threads"):
        go("setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 0;\n", output("%t"))


def test_a_barrier_of_one_block():
    """It separates the accesses of that block only."""
    one = "mov.u32 %r9, %ctaid.x; setp.eq.u32 %p1, %r9, 0;\n"
    read = "ld.shared.b32 %r2, [%d4];\n"
    go(one, WRITE, "@%p1 bar.sync 0; @%p1 ", read, "@!%p1 mov.b32 %r2, 0;\n", output())
    with pytest.raises(Fault, match="a race"):
        go(one, WRITE, "@%p1 bar.sync 0;\n", read, output())


@pytest.mark.parametrize(
    "text", ["bar.sync 16;", "bar.sync 0, 32;", "bar.arrive 0, 32;", "bar.warp.sync 1;"]
)
def test_other_barriers_are_unknown(text):
    with pytest.raises(Unknown):
        go(text, output("%t"))
