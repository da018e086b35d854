"""Copies of boxes by tensor maps, and the barriers that count their bytes."""

import numpy as np
import pytest

from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.launches import execute
from tests.support.ptx.machine import Launch
from tests.support.ptx.tensor_maps import TensorMap

THREADS = 64
TEXT = f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry test(
  .param .u64 .ptr .align 128 test_param_0,
  .param .align 64 .b8 test_param_1[128]
)
.maxntid {THREADS}, 1, 1
{{
  .reg .pred %p<8>;
  .reg .b32 %r<64>, %t;
  .reg .b64 %d<16>, %a, %map;
  .shared .align 16 .b8 dynamic;
  ld.param.b64 %a, [test_param_0];
  mov.b64 %map, test_param_1;
  cvta.param.u64 %map, %map;
  mov.u32 %t, %tid.x;
  setp.eq.u32 %p1, %t, 0;
  mov.b64 %d0, dynamic;
  cvt.u32.u64 %r0, %d0;
  add.s32 %r1, %r0, 4096;
{{body}}
  ret;
}}
"""
INIT = f"@%p1 mbarrier.init.shared.b64 [%r1], {THREADS};\n"
FENCE = "fence.mbarrier_init.release.cluster;\n"
SYNC = "bar.sync 0;\n"
START = INIT + FENCE + SYNC
ARRIVE = "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r1], {};\n"
WAIT = "again{0}: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], {0}, 1000; @!%p2 bra again{0};\n"
LOOK = "{}mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;\n"  # whose time limit may pass
# Each thread stores 4 bytes of shared memory.
STORE = "shl.b32 %r2, %t, 2; add.s32 %r3, %r0, %r2; ld.shared.b32 %r4, [%r3];\n"
STORE += "mul.wide.u32 %d1, %t, 4; add.s64 %d2, %a, %d1; st.global.b32 [%d2], %r4;\n"


def copy(*coordinates, to="%r0", space="cta"):
    """The instruction; coordinates are innermost first."""
    opcode = f"cp.async.bulk.tensor.{len(coordinates)}d.shared::{space}.global"
    operands = f"[{to}], [%map, {{{', '.join(map(str, coordinates))}}}], [%r1]"
    return f"@%p1 {opcode}.mbarrier::complete_tx::bytes {operands};\n"


def go(body, array, tensor_map, words=THREADS, blocks=1, limit=1000, alignment=128):
    """What the threads store."""
    launch = Launch(
        (blocks, 1, 1),
        THREADS,
        8192,
        alignment=alignment,
        tensor_maps={1: (tensor_map,)},
        arrays={0: 1},
    )
    text = TEXT.replace("{body}", body)
    [found] = execute(text, launch, [array], [np.empty(words, "u4")], limit=limit)
    return found


def expected(array, tensor_map, first):
    """The 256 bytes that a box has in shared memory: element by element, in Python."""
    flat = array.reshape(-1).view(np.uint8)
    size, found = tensor_map.itemsize, [0] * 256
    for number, index in enumerate(np.ndindex(tensor_map.box)):
        at = [f + i for f, i in zip(first, index, strict=True)]
        inside = all(0 <= a < n for a, n in zip(at, tensor_map.sizes, strict=True))
        start = sum(a * s for a, s in zip(at, tensor_map.strides, strict=True)) * size
        for byte in range(size):
            place = number * size + byte
            # A line of 128 bytes has 8 pieces; its number moves them within the swizzle's width.
            line, piece, rest = place // 128, place // 16 % 8, place % 16
            piece ^= line % 8 & (tensor_map.swizzle // 16 - 1)
            found[128 * line + 16 * piece + rest] = flat[start + byte] if inside else 0
    return np.array(found, np.uint8).view(np.uint32)


def array_of(*shape, dtype):
    return np.random.default_rng(0).integers(1, 250, shape).astype(dtype)


# The array's shape and dtype, the box, where it starts, and the swizzle.
BOXES = [
    ((128,), "u4", (64,), (32,), 16),
    ((10, 64), "u2", (4, 32), (3, 16), 16),
    ((10, 64), "u2", (4, 32), (8, 48), 16),
    ((10, 64), "u2", (4, 32), (-2, -8), 16),
    ((9, 32), "u4", (2, 32), (5, 0), 128),
    ((9, 32), "u4", (2, 32), (8, 16), 128),
    ((9, 64), "u1", (4, 64), (3, 0), 64),
    ((20, 16), "u2", (8, 16), (11, 0), 32),
    ((3, 5, 16), "u4", (2, 2, 16), (0, 2, 0), 16),
    ((3, 4, 5, 16), "u2", (2, 1, 4, 16), (1, 3, 0, 8), 32),
    ((2, 3, 2, 4, 16), "u1", (2, 2, 1, 4, 16), (0, 1, 1, 0, 0), 16),
]


@pytest.mark.parametrize("space", ["cta", "cluster"])
@pytest.mark.parametrize(("shape", "dtype", "box", "first", "swizzle"), BOXES)
def test_copies(shape, dtype, box, first, swizzle, space):
    array = array_of(*shape, dtype=dtype)
    strides = tuple(s // array.itemsize for s in array.strides)
    tensor_map = TensorMap(0, array.itemsize, shape, strides, box, swizzle)
    body = START + ARRIVE.format(4) + copy(*reversed(first), space=space) + WAIT.format(0) + STORE
    np.testing.assert_array_equal(go(body, array, tensor_map), expected(array, tensor_map, first))


ARRAY = array_of(256, dtype="u4")
MAP = TensorMap(0, 4, (256,), (1,), (64,), 16)


def test_phases():
    """A barrier is used again and again; the parity says for which phase a thread waits."""
    body = START + ARRIVE.format(4) + copy(0) + WAIT.format(0) + STORE + SYNC
    body += ARRIVE.format(4) + copy(64) + WAIT.format(1) + STORE.replace("[%d2]", "[%d2+256]")
    np.testing.assert_array_equal(go(body, ARRAY, MAP, words=128), ARRAY[:128])


def test_an_arrival_with_a_result():
    """The short form of the instruction."""
    arrive = "mbarrier.arrive.expect_tx.shared.b64 %d9, [%r1], 4;\n"
    body = START + arrive + copy(0) + WAIT.format(0) + STORE
    np.testing.assert_array_equal(go(body, ARRAY, MAP), ARRAY[:64])


def test_each_block_has_its_own_barrier():
    body = START + ARRIVE.format(4) + "mov.u32 %r5, %ctaid.x; shl.b32 %r6, %r5, 6;\n"
    body += copy("%r6") + WAIT.format(0)
    body += STORE.replace(
        "mul.wide.u32 %d1, %t, 4;", "add.s32 %r7, %r6, %t; mul.wide.u32 %d1, %r7, 4;"
    )
    np.testing.assert_array_equal(go(body, ARRAY, MAP, words=256, blocks=4), ARRAY)


# Threads 32 to 63 read a word that thread 0 wrote, and thread 1 writes it when it may.
READ_AND_WRITE = """
@%p1 mbarrier.init.shared.b64 [%r1], {count};
mov.b32 %r9, 7; @%p1 st.shared.b32 [%r0], %r9; bar.sync 0;
setp.ge.u32 %p3, %t, 32; setp.eq.u32 %p4, %t, 1;
@%p3 ld.shared.b32 %r9, [%r0];
{arrive}
@%p3 bra over;
{wait}
@%p4 st.shared.b32 [%r0], %t;
over: mul.wide.u32 %d1, %t, 4; add.s64 %d2, %a, %d1; st.global.b32 [%d2], %r9;
"""
ARRIVE_SO_OFTEN = "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r1], {};\n"


ARRIVE_ONCE, WAIT_ONCE = ARRIVE_SO_OFTEN.format(1), WAIT.format(0)


def read_and_write(count=THREADS, arrive=ARRIVE_ONCE, wait=WAIT_ONCE):
    body = READ_AND_WRITE.format(count=count, arrive=arrive, wait=wait)
    np.testing.assert_array_equal(go(body, ARRAY, MAP), THREADS * [7])


def test_arrivals_of_all_threads_and_a_wait_of_some():
    """What each did before it arrived comes before what follows the wait."""
    read_and_write()
    read_and_write(3 * THREADS, ARRIVE_SO_OFTEN.format(3))
    read_and_write(3 * THREADS, ARRIVE_SO_OFTEN.format(1) + ARRIVE_SO_OFTEN.format(2))
    read_and_write(arrive=ARRIVE.format(0))


NOT_ORDERED = {
    "no wait": {"wait": ""},
    "no arrivals of those that read": {"count": 32, "arrive": "@!%p3 " + ARRIVE_ONCE},
    "no arrivals of those that wait": {"count": 32, "arrive": "@%p3 " + ARRIVE_ONCE},
    "a read after the arrival": {"arrive": ARRIVE_ONCE + "@%p3 ld.shared.b32 %r9, [%r0];\n"},
    "another thread's wait": {"wait": "@%p4 bra free; " + WAIT_ONCE + "free:"},
}


@pytest.mark.parametrize("name", NOT_ORDERED)
def test_arrivals_that_order_nothing(name):
    with pytest.raises(Fault, match="a race: a write over what another thread reads"):
        read_and_write(**NOT_ORDERED[name])


def test_too_many_arrivals():
    with pytest.raises(Fault, match="more arrivals"):
        read_and_write(THREADS + 1, ARRIVE_SO_OFTEN.format(2))
    with pytest.raises(Fault, match="no end within"):
        read_and_write(THREADS + 1)


def test_a_map_may_be_prefetched():
    body = "prefetch.tensormap [%map];\n" + START + ARRIVE.format(4) + copy(0) + WAIT.format(0)
    np.testing.assert_array_equal(go(body + STORE, ARRAY, MAP), ARRAY[:64])


FAULTS = {
    "before its wait": START + ARRIVE.format(4) + copy(0) + STORE,
    "not fenced": INIT + SYNC + ARRIVE.format(4) + copy(0),
    "an mbarrier that another thread initialized": INIT + FENCE + ARRIVE.format(4),
    "is initialized a second time": INIT.replace("@%p1 ", ""),
    "a parity that is neither": START + WAIT.format(0).replace("], 0,", "], 2,"),
    "was not initialized": SYNC + ARRIVE.format(4),
    "more arrivals": START + ARRIVE.format(8) + ARRIVE.format(0),
    "no end within 1": START + ARRIVE.format(8) + copy(0) + WAIT.format(0),
    "no end within": START + ARRIVE.format(4) + copy(0) + WAIT.format(1),
    "a wait for copies without some": START
    + ARRIVE.format(4)
    + copy(0)
    + LOOK.format("@%p1 ")
    + LOOK.format("@%p1 "),
    "asynchronous copy before its wait": START
    + ARRIVE.format(4)
    + copy(0)
    + LOOK.format("")
    + STORE,
    "a write over what another thread reads": START
    + ARRIVE.format(4)
    + copy(0)
    + WAIT.format(0)
    + STORE
    + copy(64),
    "an access to bytes of an asynchronous copy": START + ARRIVE.format(8) + copy(0) + copy(64),
    "a misaligned access": "mbarrier.init.shared.b64 [%r0+4], 1;\n",
    "no tensor map is at": "add.s64 %map, %map, 64; prefetch.tensormap [%map];\n",
    "a copy of rank 2": START + ARRIVE.format(4) + copy(0, 0),
    "a copy of rank 1 to": "add.s32 %r9, %r0, 64;\n" + START + ARRIVE.format(4) + copy(0, to="%r9"),
    "outside of shared memory": "add.s32 %r9, %r0, 8064;\n" + START + copy(0, to="%r9"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults(message):
    with pytest.raises(Fault, match=message):
        go(FAULTS[message], ARRAY, MAP)


@pytest.mark.parametrize(
    ("strides", "box", "swizzle"),
    [
        ((32, 2), (2, 32), 16),
        ((30, 1), (2, 32), 16),
        ((32, 1), (2, 30), 16),
        ((32, 1), (257, 4), 16),
        ((32, 1), (2, 32), 64),
    ],
)
def test_maps_that_hardware_refuses(strides, box, swizzle):
    with pytest.raises(Fault, match="of a tensor map"):
        TensorMap(0, 4, (8, 32), strides, box, swizzle)


def test_a_swizzle_that_is_not_known():
    with pytest.raises(Unknown, match="a swizzle of 256 bytes"):
        TensorMap(0, 4, (8, 32), (32, 1), (2, 32), 256)


def test_a_tensor_that_is_not_aligned():
    with pytest.raises(Fault, match="a tensor that does not start at 16 bytes"):
        go(START + ARRIVE.format(4) + copy(0), ARRAY, MAP, alignment=8)


def test_a_copy_outside_of_its_array():
    too_large = TensorMap(0, 4, (288,), (1,), (64,), 16)
    with pytest.raises(Fault, match="outside"):
        go(START + ARRIVE.format(4) + copy(224), ARRAY, too_large)
