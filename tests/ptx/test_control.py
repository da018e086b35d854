"""Branches, guards, special registers; and that nothing unknown is passed over."""

import collections

import numpy as np
import pytest

from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.instructions import TABLE
from tests.support.ptx.parser import parse
from tests.support.ptx.programs import apply, run
from tests.support.ptx.scalar_types import bits_of

OUTPUT = "mul.wide.u32 %d1, %i, 4; add.s64 %d2, %a0, %d1; st.global.b32 [%d2], %r1;\n"


def go(body, threads=32, blocks=1, **rest):
    [found] = run(body + OUTPUT, [], [((threads * blocks,), "u4")], threads, blocks, **rest)
    return found


def test_a_loop_of_another_length_in_each_thread():
    """Sums of 0 to i, then all go on together."""
    body = """
    mov.b32 %r1, 0; mov.b32 %r2, 0;
    again: add.s32 %r1, %r1, %r2; setp.lt.u32 %p1, %r2, %i; add.s32 %r2, %r2, 1;
    @%p1 bra again;
    bar.sync 0;
    """
    i = np.arange(128)
    np.testing.assert_array_equal(go(body, 64, 2), i * (i + 1) // 2)


def test_barriers_by_their_numbers():
    """Threads exchange values by way of shared memory, with any barrier for all of them."""
    body = """
    mov.b64 %d3, dynamic; mul.wide.u32 %d4, %t, 4; add.s64 %d4, %d3, %d4; st.shared.b32 [%d4], %t;
    mov.b32 %r2, 3; {}
    xor.b32 %r3, %t, 33; mul.wide.u32 %d4, %r3, 4; add.s64 %d4, %d3, %d4; ld.shared.b32 %r1, [%d4];
    """
    for barrier in ("bar.sync 1;", "bar.sync %r2, 64;", "bar.sync 15, 64;"):
        found = go(body.format(barrier), 64, shared=256)
        np.testing.assert_array_equal(found, np.arange(64) ^ 33)
    with pytest.raises(Unknown, match="a barrier of a part of the block"):
        go(body.format("bar.sync 1, 32;"), 64, shared=256)
    for barrier in ("bar.sync 16;", "bar.sync %t;"):
        with pytest.raises(Unknown, match="different barriers, or more than 16"):
            go(body.format(barrier), 64, shared=256)
    with pytest.raises(Fault, match="no barrier between"):
        go(body.format(""), 64, shared=256)


def test_branches_in_branches():
    body = """
    and.b32 %r2, %t, 1; setp.eq.b32 %p1, %r2, 0; setp.gt.u32 %p2, %t, 9;
    @%p1 bra even;
    mov.b32 %r1, 1; @!%p2 bra.uni join; mov.b32 %r1, 11; bra join;
    even: mov.b32 %r1, 2; @%p2 bra large; bra join;
    large: mov.b32 %r1, 22;
    join:
    bar.sync 0;
    """
    t = np.arange(32)
    expected = np.where(t % 2, np.where(t > 9, 11, 1), np.where(t > 9, 22, 2))
    np.testing.assert_array_equal(go(body), expected)


def test_some_threads_end_early():
    body = "mov.b32 %r1, 3; setp.lt.u32 %p1, %t, 4;\n" + OUTPUT + "@%p1 ret;\n"
    np.testing.assert_array_equal(go(body + "mov.b32 %r1, 4;"), np.where(np.arange(32) < 4, 3, 4))
    with pytest.raises(Fault, match="a barrier without some"):
        go(body + "bar.sync 0;")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("%tid.x", np.tile(np.arange(64), 3)),
        ("%ctaid.x", np.repeat(np.arange(3), 64)),
        ("%ntid.x", np.full(192, 64)),
        ("%nctaid.x", np.full(192, 3)),
        ("%laneid", np.tile(np.arange(32), 6)),
        ("%warpid", np.tile(np.repeat([0, 1], 32), 3)),
        ("%ctaid.y", np.zeros(192)),
        ("%nctaid.z", np.ones(192)),
    ],
)
def test_special_registers(name, expected):
    np.testing.assert_array_equal(go(f"mov.u32 %r1, {name};", 64, 3), expected)


KINDS = ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "pred")


@pytest.mark.parametrize("kind", KINDS)
def test_moves(kind):
    width = bits_of(kind)
    values = np.random.default_rng(0).integers(0, 2, 32, np.uint8)
    if kind != "pred":
        values = np.frombuffer(np.random.default_rng(0).bytes(4 * width), f"u{width // 8}")
    np.testing.assert_array_equal(apply(f"mov.{kind}", kind, [kind], values), values)


def test_instructions_of_two_names():
    """They do what their better known forms do."""
    assert (go("mov.b32 %r1, 3; barrier.sync.aligned 0; griddepcontrol.wait;") == 3).all()
    with pytest.raises(Fault, match="a barrier without some"):
        go("setp.lt.u32 %p1, %t, 3; @%p1 barrier.sync.aligned 0;")
    body = "mov.b32 %r1, 3; griddepcontrol.launch_dependents;\n" + OUTPUT
    np.testing.assert_array_equal(go(body + "exit; mov.b32 %r1, 4;\n"), 32 * [3])


def test_packing():
    """Packing puts the first register lowest, and unpacking takes it from there."""
    body = "mov.b64 %d3, {%t, 7}; mov.b64 {%r2, %r3}, %d3; mov.b32 {%h1, %h2}, %r2;"
    body += "mov.b32 %r4, {%h2, %h1}; add.s32 %r1, %r4, %r3;"
    np.testing.assert_array_equal(go(body), (np.arange(32) << 16) + 7)


def test_names_of_a_scope_hide_others():
    body = "{ .reg .b32 x; mov.b32 x, 5; { .reg .b32 x; mov.b32 x, 6; } mov.b32 %r1, x; }"
    assert (go(body) == 5).all()


def test_labels_of_a_scope():
    """Two scopes may have the same, and a branch goes to the innermost."""
    jump = "{ bra over; mov.b32 %r1, 7; over: add.s32 %r1, %r1, 1; }\n"
    assert (go("mov.b32 %r1, 0;" + 2 * jump) == 2).all()
    outer = "mov.b32 %r1, 0; { { bra over; over: add.s32 %r1, %r1, 1; } bra over; "
    assert (go(outer + "add.s32 %r1, %r1, 5; over: add.s32 %r1, %r1, 2; }") == 3).all()
    assert (go("mov.b32 %r1, 0; { bra over; } add.s32 %r1, %r1, 5; over: bra end; end:") == 0).all()
    with pytest.raises(Unknown, match="the label over again"):
        go("mov.b32 %r1, 0; { over: over: }")
    with pytest.raises(Unknown, match="the label inside"):
        go("mov.b32 %r1, 0; bra inside; { inside: }")


def test_threads_meet_where_their_ways_do():
    """Half of them go around by code that is far behind, in a loop whose head is at its end."""
    body = """
    mov.b32 %r1, 0; mov.b32 %r2, 0; setp.lt.u32 %p1, %t, 16; bra head;
    meet: bar.sync 0; add.s32 %r1, %r1, 1; add.s32 %r2, %r2, 1;
    setp.eq.u32 %p2, %r2, 3; @%p2 bra done;
    head: @%p1 bra meet;
    add.s32 %r1, %r1, 10; bra meet;
    done: bar.sync 0;
    """
    np.testing.assert_array_equal(go(body), np.where(np.arange(32) < 16, 3, 33))


def test_constants_of_a_module():
    text = """
    .target sm_80
    .global .align 4 .b8 table[4] = {1, 2, 0, 255};
    .shared .align 16 .b8 fixed[300];
    .extern .shared .align 16 .b8 rest[];
    .visible .entry k(.param .u64 .ptr .align 16 k_param_0, .param .u64 k_param_1)
    .reqntid 96
    { ret; }
    """
    kernel = parse(text)
    assert (kernel.name, kernel.target, kernel.threads) == ("k", "sm_80", 96)
    assert kernel.parameters == {"k_param_0": 16, "k_param_1": 1}
    assert kernel.constants["table"].tolist() == [1, 2, 0, 255]
    assert kernel.shared == {"fixed": 0, "rest": 384}


def test_no_end():
    with pytest.raises(Fault, match="no end within 1000 instructions"):
        go("mov.b32 %r1, 0; again: bra again;", limit=1000)


UNKNOWN = {
    "popc.b32 %r1, %t;": "popc.b32",
    "mul.f32 %r1, %t, %t;": "mul.f32",  # the assembler may fuse it with a sum
    "add.rn.ftz.f32 %r1, %t, %t;": "add.rn.ftz.f32",
    "rcp.approx.f32 %r1, %t;": "rcp.approx.f32",
    "div.full.f32 %r1, %t, %t;": "div.full.f32",
    "ld.global.nc.b32 %r1, [%a0];": "ld.global.nc.b32",
    "ld.volatile.shared.b32 %r1, [%a0];": "ld.volatile.shared.b32",
    "st.global.wt.b32 [%a0], %t;": "st.global.wt.b32",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 %r1, %r1, %r1, %r1;": "f16.f16.f16.f16",
    "add.s32 %r1, %t;": "add.s32 with 2 operands",
    "add.s32 %r1, %d1, %t;": "%d1 is .b64",
    "mov.b32 %r1, %d1;": "%d1 is .b64",
    "add.s32 %r1, %t, nowhere;": "nowhere",
    "add.s32 %r1, %t, %clock;": "%clock",
    "add.s32 %r1, %q1, %t;": "%q1",
    "add.s32 %r1, %t, 0d3FF0000000000000;": "a float of 64 bits",
    "ld.global.b32 %r1, [%p1];": "%p1, .pred, as .u32",
    "shfl.sync.idx.b32 %r1, %h1, 0, 31, -1;": "%h1, .b16, as .b32",
    "redux.sync.max.s32 %r1, %t, 15;": "a part of a warp",
    "lop3.b32 %r1, %t, %t, %t, %t;": "no constant",
    "bra nowhere;": "nowhere",
    ".local .b32 x;": ".local",
    "call (%r1), f, (%r2);": "call",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_unknown_is_named(text):
    with pytest.raises(Unknown) as error:
        go("mov.b32 %r1, 0; mov.b64 %d1, 0; mov.b16 %h1, 0; mov.pred %p1, 0;\n" + text)
    assert UNKNOWN[text] in str(error.value)


def test_what_is_unknown_need_not_be_reached():
    with pytest.raises(Unknown, match="popc"):
        go("mov.b32 %r1, 0; bra over; popc.b32 %r1, %t; over: mov.b32 %r1, 1;")


# Instructions that are not only a function of a thread's own values -> how many forms there are.
# Whoever adds one tests it: loads and copies in test_memory.py, shfl, redux and vote in
# test_warp.py, mma and matrices in test_matrices.py, wgmma and fences in test_wgmma.py, moves,
# conversions of integers and branches here and in test_values.py, barriers in test_races.py.
FORMS = {
    "ld": 112,
    "st": 108,
    "mov": 11,
    "cvt": 88,
    "cp": 17,
    "shfl": 4,
    "redux": 9,
    "vote": 3,
    "ldmatrix": 6,
    "stmatrix": 6,
    "mma": 4,
    "wgmma": 131,
    "fence": 3,
    "bra": 2,
    "ret": 1,
    "exit": 1,
    "bar": 3,
    "barrier": 2,
    "mbarrier": 6,
    "prefetch": 1,
    "elect": 1,
    "movmatrix": 1,
    "griddepcontrol": 2,
}


def test_the_number_of_forms():
    found = collections.Counter(o.partition(".")[0] for (o, _), d in TABLE.items() if not d.kinds)
    assert found == FORMS
