"""Products of a warp group, and the order in which their parts must come."""

import numpy as np
import pytest

from tests.support.ptx.counters import CountingMachine
from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.fragments import (
    DTYPES,
    fragments_of_a,
    load,
    matrix_of,
    registers,
    small,
    store,
)
from tests.support.ptx.machine import Launch, Machine
from tests.support.ptx.parser import parse
from tests.support.ptx.programs import module, run


# The layouts of CUTLASS's "canonical" descriptors, in bytes: name -> (top bits, the place of
# element [r, k] for a leading offset and a stride, both in bytes).
def k_contiguous(width):
    def place(r, k, lead, stride):
        if width == 16:
            return r // 8 * stride + k // 8 * lead + r % 8 * 16 + k % 8 * 2
        return r // 8 * stride + r % 8 * width + k * 2

    return place


def row_contiguous(width):
    def place(r, k, lead, stride):
        if width == 16:
            return r // 8 * stride + k // 8 * lead + k % 8 * 16 + r % 8 * 2
        across = width // 2
        return r // across * lead + k // 8 * stride + k % 8 * width + r % across * 2

    return place


MODES = {16: 0, 128: 1, 64: 2, 32: 3}


def swizzled(address, width):
    """The address's 16-byte piece is moved within 128 bytes by the number of their line."""
    pieces = width // 16 - 1
    return address ^ (address // 128 & pieces) * 16


def image(matrix, kind, width, transposed, start, lead, stride, size):
    """Shared memory of `size` bytes that holds a [rows, 16] operand, and its descriptor."""
    place = (row_contiguous if transposed else k_contiguous)(width)
    memory = np.zeros(size // 2, DTYPES[kind])
    for r, k in np.ndindex(matrix.shape):
        address = swizzled(1024 + start + place(r, k, lead, stride), width) - 1024
        memory[address // 2] = matrix[r, k]
    fields = (1024 + start) // 16 | lead // 16 << 16 | stride // 16 << 32
    return memory.view(np.uint8), fields | MODES[width] << 62


COPY = """
mov.b64 %d0, dynamic; mov.b32 %r250, 0;
fill: mad.lo.s32 %r251, %r250, 128, %t; mul.wide.u32 %d1, %r251, 16;
add.s64 %d2, %a0, %d1; ld.global.v4.b32 {{%r252, %r253, %r254, %r255}}, [%d2];
add.s64 %d3, %d0, %d1; st.shared.v4.b32 [%d3], {{%r252, %r253, %r254, %r255}};
add.s32 %r250, %r250, 1; setp.lt.u32 %p7, %r250, {rounds}; @%p7 bra fill;
"""
FENCES = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;\n"
FINISH = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
LAYOUTS = [
    *((w, False, 128 if w == 16 else 16, 256 if w == 16 else 8 * w) for w in MODES),
    *((w, True, 128 if w == 16 else 2048, 256 if w == 16 else 8 * w) for w in (16, 32, 64)),
    (128, True, 2048, 1024),
]


def product(n, kind, a, b, more, accumulate="1"):
    text = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {registers(100, n // 2)}, "
    return text + f"{a}, {b}, {accumulate}, 1, 1, {more};\n"


@pytest.mark.parametrize(("width", "transposed", "lead", "stride"), LAYOUTS)
@pytest.mark.parametrize("kind", DTYPES)
def test_wgmma(kind, width, transposed, lead, stride):
    """A from registers, B from shared memory, added to what the registers hold."""
    n = 64
    a, b, c = small(0, 64, 16), small(1, n, 16), small(2, 128, n // 2)
    memory, descriptor = image(b, kind, width, transposed, 0, lead, stride, 8192)
    body = COPY.format(rounds=4) + load(1, 1, 4) + load(2, 100, n // 2) + FENCES
    body += f"mov.b64 %d4, {descriptor:#x};\n"
    body += product(n, kind, registers(1, 4), "%d4", int(transposed)) + FINISH
    operands = [memory, fragments_of_a(a, kind), c]
    [found] = run(body + store(3, 100, n // 2), operands, [((128, n // 2), "f4")], 128, shared=8192)
    np.testing.assert_array_equal(matrix_of(found, 64), a @ b.T + matrix_of(c, 64))


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_of_each_width(n):
    a, b = small(0, 64, 16), small(1, n, 16)
    memory, descriptor = image(b, "bf16", 128, False, 0, 16, 1024, 32768)
    body = COPY.format(rounds=16) + load(1, 1, 4) + FENCES + f"mov.b64 %d4, {descriptor:#x};\n"
    body += product(n, "bf16", registers(1, 4), "%d4", 0, "0") + FINISH
    operands = [memory, fragments_of_a(a, "bf16")]
    result = [((128, n // 2), "f4")]
    [found] = run(body + store(2, 100, n // 2), operands, result, 128, shared=32768)
    np.testing.assert_array_equal(matrix_of(found, 64), a @ b.T)


@pytest.mark.parametrize(("width", "transposed", "lead", "stride"), LAYOUTS)
def test_wgmma_of_shared_memory_alone(width, transposed, lead, stride):
    """Both operands; what the registers hold is ignored, so that nothing need be there."""
    n, kind = 8, "bf16"
    a, b = small(0, 64, 16), small(1, n, 16)
    left, of_a = image(a, kind, width, transposed, 0, lead, stride, 8192)
    right, of_b = image(b, kind, 128, False, 8192, 16, 1024, 16384)
    body = COPY.format(rounds=8) + FENCES
    body += f"mov.b64 %d4, {of_a:#x}; mov.b64 %d5, {of_b:#x};\n"
    body += product(n, kind, "%d4", "%d5", f"{int(transposed)}, 0", "0") + FINISH
    memory = np.maximum(np.pad(left, (0, 8192)), right)
    [found] = run(
        body + store(1, 100, n // 2), [memory], [((128, n // 2), "f4")], 128, shared=16384
    )
    np.testing.assert_array_equal(matrix_of(found, 64), a @ b.T)


def two_groups(end, machine=Machine):
    """Accumulators after two warp groups multiply their own rows by the same B."""
    a, b = small(0, 128, 16), small(1, 8, 16)
    memory, descriptor = image(b, "bf16", 128, False, 0, 16, 1024, 4096)
    body = COPY.format(rounds=1).replace("128, %t", "256, %t") + load(1, 1, 4)
    body += FENCES + f"mov.b64 %d4, {descriptor:#x};\n"
    body += product(8, "bf16", registers(1, 4), "%d4", 0, "0") + end + store(2, 100, 4)
    operands, result = [memory, fragments_of_a(a, "bf16")], np.empty((256, 4), np.float32)
    launch = Launch((1, 1, 1), 256, 4096)
    done = machine(parse(module(body, 3, 256)), launch, operands, [result]).run()
    np.testing.assert_array_equal(matrix_of(done.memory.result(0), 128), a @ b.T)
    return done


def test_two_groups_that_share_an_operand():
    """Each reads all of it from shared memory."""
    assert two_groups(FINISH, CountingMachine).counts()["wgmma"] == 2 * 8 * 16 * 2 // 128


def test_what_one_group_reads_the_other_may_not_write():
    """Until all have waited and met; those threads alone that write do not suffice."""
    writes = "setp.eq.s32 %p1, %t, 0; @%p1 st.shared.b32 [%d0], %t;"
    two_groups(FINISH + "bar.sync 0;" + writes)
    with pytest.raises(Fault, match="a race: a write over what another thread reads"):
        two_groups(FINISH + writes)


# All of shared memory and A is 1, and the accumulators are 0 where a product needs them.
COPIED = COPY.format(rounds=1) + load(0, 1, 4) + "mov.b64 %d4, 0x4000000800080040;\n"
START = COPIED + "".join(f"mov.b32 %r{r}, 0;" for r in range(100, 104))
PRODUCT = product(8, "f16", registers(1, 4), "%d4", 0)
ONE_THREAD_WRITES = "setp.eq.s32 %p1, %t, 0; @%p1 st.shared.b32 [%d0], %r1;"


def ones(body):
    """The accumulators after a body, one for all of them."""
    memory = np.ones(1024, np.float16)
    result = [((128, 4), "f4")]
    [found] = run(body + store(1, 100, 4), [memory], result, 128, shared=2048)
    assert (found == found[0, 0]).all()
    return found[0, 0]


def test_products_that_add_up():
    assert ones(START + FENCES + PRODUCT + FINISH) == 16
    assert ones(START + FENCES + 2 * PRODUCT + FINISH) == 32
    assert ones(START + FENCES + 2 * (PRODUCT + FINISH)) == 32
    assert ones(START + FENCES + PRODUCT + FINISH + "bar.sync 0;" + ONE_THREAD_WRITES) == 16
    assert ones(START + FENCES.replace(".shared::cta", "") + PRODUCT + FINISH) == 16
    # A may be read while the product runs.
    assert ones(START + FENCES + PRODUCT + "add.s32 %r9, %r1, 1;" + FINISH) == 16


BAD_ORDERS = {
    "no proxy fence": (
        START + FENCES.replace("fence.proxy.async.shared::cta;", "") + PRODUCT + FINISH,
        "what no fence.proxy has made visible: wgmma",
    ),
    "a write after the fence": (
        START + FENCES + ONE_THREAD_WRITES + "bar.sync 0;" + PRODUCT + FINISH,
        "what no fence.proxy has made visible",
    ),
    "another thread's fence": (
        START + FENCES.replace("fence", "setp.gt.u32 %p1, %t, 9; @%p1 fence", 1) + PRODUCT,
        "what no fence.proxy has made visible",
    ),
    "no barrier": (START + FENCES.replace("bar.sync 0;", "") + PRODUCT + FINISH, "a race: a read"),
    "no register fence": (
        START + FENCES + "mov.b32 %r2, 1;" + PRODUCT + FINISH,
        "no wgmma.fence after %r2 was written",
    ),
    "no wait": (START + FENCES + PRODUCT, "%r100 of an asynchronous product is read"),
    "no commit": (
        START + FENCES + PRODUCT + "wgmma.wait_group.sync.aligned 0;",
        "%r100 of an asynchronous product is read",
    ),
    "a wait for too few": (
        START + FENCES + PRODUCT + FINISH.replace("aligned 0", "aligned 1"),
        "%r100 of an asynchronous product is read",
    ),
    "A is overwritten": (
        START + FENCES + PRODUCT + "mov.b32 %r4, 0;",
        "%r4 of an asynchronous product is written",
    ),
    "B is overwritten": (
        START + FENCES + PRODUCT + "bar.sync 0;" + ONE_THREAD_WRITES,
        "over what an asynchronous product may still read",
    ),
    "no accumulators": (COPIED + FENCES + PRODUCT, "%r100 is read before it is written"),
    "nothing there": (
        START.replace("128, %t;", "64, %t; setp.lt.u32 %p2, %t, 60;").replace(
            "st.shared", "@%p2 st.shared"
        )
        + FENCES
        + "add.s64 %d4, %d4, 56;"
        + PRODUCT,
        "nothing wrote",
    ),
    "outside": (START + FENCES + "mov.b64 %d4, 0x4000000800083fff;" + PRODUCT, "outside"),
    "many descriptors": (
        START + FENCES + "cvt.u64.u32 %d5, %t; add.s64 %d4, %d4, %d5;" + PRODUCT,
        "a descriptor differs within a warp group",
    ),
}


@pytest.mark.parametrize("name", BAD_ORDERS)
def test_what_wgmma_needs(name):
    body, problem = BAD_ORDERS[name]
    with pytest.raises(Fault, match=problem):
        ones(body)


def test_products_that_outlive_the_launch():
    with pytest.raises(Fault, match="ends with products that were not waited for"):
        run(START + FENCES + PRODUCT, [np.ones(1024, np.float16)], [], 128, shared=2048)


@pytest.mark.parametrize(
    "changed",
    [
        "setp.lt.u32 %p1, %t, 64; @%p1 " + PRODUCT,
        PRODUCT.replace("1, 1, 1", "1, -1, 1"),
        PRODUCT.replace(", 0;", ", 0, 0;"),
        "mov.b64 %d4, 0x4002000800080040;" + PRODUCT,
    ],
)
def test_wgmma_in_other_forms(changed):
    with pytest.raises(Unknown):
        ones(START + FENCES + changed)
