"""What the counting machine counts, on accesses whose cost is known."""

import numpy as np
import pytest

from tests.support.ptx.counters import CountingMachine, wavefronts
from tests.support.ptx.machine import Launch
from tests.support.ptx.parser import parse
from tests.support.ptx.programs import module

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("offsets", "size", "expected"),
    [
        (4 * LANES, 4, 1),  # each bank once
        (0 * LANES, 4, 1),  # one word for all
        (8 * LANES, 4, 2),  # two words a bank
        (128 * LANES, 4, 32),  # all in one bank
        (132 * LANES, 4, 1),  # a row of 33 words
        (LANES, 1, 1),  # four threads a word
        (64 * LANES, 2, 16),
        (8 * LANES, 8, 2),  # 16 threads at a time
        (16 * LANES, 16, 4),  # 8 threads at a time
        (128 * LANES, 16, 32),  # rows of one matrix on top of each other
        (144 * LANES, 16, 4),  # and moved apart by their own size
    ],
)
def test_wavefronts(offsets, size, expected):
    assert wavefronts(offsets, size, LANES) == expected
    threads = np.concatenate([LANES, 32 + LANES])
    both = np.concatenate([offsets, offsets])  # each warp has wavefronts of its own
    assert wavefronts(both, size, threads) == 2 * expected


def test_a_part_of_a_warp():
    assert wavefronts(128 * LANES[:5], 4, LANES[:5]) == 5
    assert wavefronts(16 * LANES[:9], 16, LANES[:9]) == 2


def test_a_launch():
    """A load of every second word, a store to shared memory with a stride, a load without."""
    body = """
    mul.wide.u32 %d8, %i, 8;
    add.s64 %d9, %a0, %d8;
    ld.global.b32 %r1, [%d9];
    shl.b32 %r2, %t, 3;
    mov.b32 %r3, dynamic;
    add.s32 %r4, %r3, %r2;
    st.shared.b32 [%r4], %r1;
    bar.sync 0;
    ld.shared.b32 %r5, [%r4];
    mul.wide.u32 %d8, %i, 4;
    add.s64 %d9, %a1, %d8;
    st.global.b32 [%d9], %r5;
    """
    operands = [np.arange(128, dtype=np.uint32)]
    text = module(body, 2, threads=32)
    machine = CountingMachine(
        parse(text), Launch((2, 1, 1), 32, 256), operands, [np.empty(64, np.uint32)]
    ).run()
    np.testing.assert_array_equal(machine.memory.result(0), operands[0][::2])
    assert machine.counts() == {"load": 4, "store": 4, "copy": 0, "wgmma": 0, "sectors": 16}
