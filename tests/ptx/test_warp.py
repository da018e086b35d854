"""Exchanges, reductions and votes of a warp."""

import functools
import operator

import numpy as np
import pytest

from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.programs import apply, element, run

VALUES = np.random.default_rng(0).integers(0, 2**32, 64, np.uint32)


def shuffled(mode, lane, by, segments, limit):
    """The lane that a lane reads from, and whether it is within bounds: as the manual has it."""
    low = lane & segments
    last = low | (limit & ~segments)
    source = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": low | (by & ~segments),
    }[mode]
    within = source >= last if mode == "up" else source <= last
    return (source if within else lane), within


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode, by, width):
    segments, limit = 32 - width, 0 if mode == "up" else 31
    bounds = segments << 8 | limit
    expected, flags = [], []
    for lane in range(64):
        source, within = shuffled(mode, lane % 32, by, segments, limit)
        expected.append(VALUES[lane // 32 * 32 + source])
        flags.append(within)
    body = f"""
    mul.wide.u32 %d1, %i, 4; add.s64 %d2, %a0, %d1; ld.global.b32 %r1, [%d2];
    shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {bounds}, -1;
    selp.b32 %r3, 1, 0, %p1;
    add.s64 %d3, %a1, %d1; st.global.b32 [%d3], %r2;
    add.s64 %d4, %a2, %d1; st.global.b32 [%d4], %r3;
    """
    found, within = run(body, [VALUES], [((64,), "u4"), ((64,), "u4")], threads=64)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(within, flags)


REDUCTIONS = {"min": min, "max": max, "add": operator.add, "and": operator.and_}
REDUCTIONS |= {"or": operator.or_, "xor": operator.xor}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("min", "max", "add") for k in ("s32", "u32")]
    + [(n, "b32") for n in ("and", "or", "xor")],
)
def test_reductions(name, kind):
    values = VALUES.view(np.int32 if kind == "s32" else np.uint32).tolist()
    expected = [functools.reduce(REDUCTIONS[name], values[i : i + 32]) % 2**32 for i in (0, 32)]
    found = apply(f"redux.sync.{name}.{kind}", kind, [kind], VALUES, operands="%r1, -1")
    np.testing.assert_array_equal(found, np.repeat(np.uint32(expected), 32))


@pytest.mark.parametrize("some", [0, 1, 31, 32])
def test_votes(some):
    values = np.zeros(64, np.uint8)
    values[:some] = values[40] = 1
    ballots = [sum(int(v) << i for i, v in enumerate(values[at : at + 32])) for at in (0, 32)]
    ballot = apply("vote.sync.ballot.b32", "b32", ["pred"], values, operands="%p1, 0xffffffff")
    np.testing.assert_array_equal(ballot, np.repeat(np.uint32(ballots), 32))
    for name, decide in {"any": any, "all": all}.items():
        found = apply(f"vote.sync.{name}.pred", "pred", ["pred"], values, operands="%p1, -1")
        np.testing.assert_array_equal(
            found, np.repeat([decide(values[:32]), decide(values[32:])], 32)
        )


def test_election():
    """One thread of each warp; all are told which."""
    body = "elect.sync %r1|%p1, -1; selp.b32 %r2, 1, 0, %p1; mul.wide.u32 %d1, %i, 4;\n"
    body += "add.s64 %d2, %a0, %d1; st.global.b32 [%d2], %r1;\n"
    body += "add.s64 %d3, %a1, %d1; st.global.b32 [%d3], %r2;\n"
    leader, chosen = run(body, [], [((64,), "u4"), ((64,), "u4")], threads=64)
    for warp in (slice(0, 32), slice(32, 64)):
        assert np.flatnonzero(chosen[warp]).tolist() == [leader[warp][0]]
        assert len(set(leader[warp])) == 1


def test_transposed_matrices():
    """Lane i has row i // 4, columns 2 (i % 4) and the next, of a matrix and of the result."""
    matrices = np.random.default_rng(0).integers(0, 2**16, (2, 8, 8), np.uint16)

    def words(matrices):
        halves = [
            (int(m[i // 4, i % 4 * 2]), int(m[i // 4, i % 4 * 2 + 1]))
            for m in matrices
            for i in range(32)
        ]
        return np.array([low | high << 16 for low, high in halves], np.uint32)

    expected = np.empty_like(matrices)
    for matrix, row, column in np.ndindex(matrices.shape):
        expected[matrix, column, row] = matrices[matrix, row, column]
    found = apply("movmatrix.sync.aligned.m8n8.trans.b16", "b32", ["b32"], words(matrices))
    np.testing.assert_array_equal(found, words(expected))


def test_a_part_of_a_warp():
    with pytest.raises(Fault, match="an instruction of a warp without some of its 32 threads"):
        run("setp.lt.u32 %p1, %t, 7; @%p1 shfl.sync.idx.b32 %r1, %t, 0, 31, -1;")


def test_a_mask_in_a_register():
    values = VALUES.view(np.uint32)
    body = element(0, "u32", "%r1") + "mov.b32 %r2, {}; redux.sync.max.u32 %r3, %r1, %r2;\n"
    body += "mul.wide.u32 %d8, %i, 4; add.s64 %d9, %a1, %d8; st.global.b32 [%d9], %r3;"
    [found] = run(body.format(-1), [values], [(64, "u4")], blocks=2)
    np.testing.assert_array_equal(found, np.repeat(values.reshape(2, 32).max(1), 32))
    with pytest.raises(Unknown, match="a part of a warp"):
        run(body.format(15), [values], [(64, "u4")], blocks=2)
