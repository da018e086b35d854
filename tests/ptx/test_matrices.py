"""Matrices between shared memory and registers, and products of a warp."""

import numpy as np
import pytest

from tests.support.ptx.faults import Fault
from tests.support.ptx.fragments import (
    DTYPES,
    fragments_of_a,
    load,
    matrix_of,
    registers,
    small,
    store,
)
from tests.support.ptx.programs import run

# Thread t has row t of 16 bytes, and stores it at place 5 t % 32.
ROWS = """
mov.b64 %d0, dynamic; mul.lo.s32 %r90, %t, 5; and.b32 %r90, %r90, 31;
mul.wide.u32 %d1, %r90, 16; add.s64 %d1, %d0, %d1;
"""


def matrix_words(rows, count, transposed):
    """What lane l gets: elements 2 (l % 4) and the next of row l / 4 of each matrix."""
    words = np.empty((32, count, 2), np.uint16)
    for lane in range(32):
        for i in range(count):
            matrix = rows[8 * i : 8 * i + 8]
            matrix = matrix.T if transposed else matrix
            words[lane, i] = matrix[lane // 4, 2 * (lane % 4) :][:2]
    return words.view(np.uint32)[..., 0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    rows = np.random.default_rng(0).integers(0, 2**16, (32, 8), np.uint16)
    trans = ".trans" if transposed else ""
    body = ROWS + load(0, 1, 4) + f"st.shared.v4.b32 [%d1], {registers(1, 4)}; bar.sync 0;\n"
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(5, count)}, [%d1];\n"
    [found] = run(body + store(1, 5, count), [rows], [((32, count), "u4")], shared=512)
    np.testing.assert_array_equal(found, matrix_words(rows, count, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, transposed):
    """It writes the rows from which `ldmatrix` makes the same words."""
    rows = np.random.default_rng(0).integers(0, 2**16, (32, 8), np.uint16)
    words = matrix_words(rows, count, transposed)
    trans = ".trans" if transposed else ""
    body = (
        ROWS + load(0, 1, count) + "mov.b32 %r9, 0; st.shared.v4.b32 [%d1], {%r9, %r9, %r9, %r9};"
    )
    body += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%d1], {registers(1, count)};\n"
    body += f"bar.sync 0; ld.shared.v4.b32 {registers(5, 4)}, [%d1];\n"
    [found] = run(body + store(1, 5, 4), [words], [((32, 8), "u2")], shared=512)
    np.testing.assert_array_equal(found[: 8 * count], rows[: 8 * count])
    assert not found[8 * count :].any()


def test_ldmatrix_of_what_is_not_there():
    text = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%d1];"
    with pytest.raises(Fault, match="nothing wrote"):
        run(ROWS + text, shared=512)
    with pytest.raises(Fault, match="misaligned"):
        run(ROWS + "add.s64 %d1, %d1, 8;" + text, shared=512)
    with pytest.raises(Fault, match="a matrix without some of its 32 threads"):
        run(ROWS + "setp.lt.u32 %p1, %t, 8; @%p1 " + text, shared=512)
    four = "mov.b32 %r1, 0; st.shared.v4.b32 [%d1], {%r1, %r1, %r1, %r1};" + text
    with pytest.raises(Fault, match="a race"):  # with the rows of other threads
        run(
            ROWS + four + "xor.b32 %r2, %t, 1; mul.wide.u32 %d2, %r2, 16; add.s64 %d2, %d0, %d2;"
            "st.shared.b32 [%d2], %r1;",
            shared=512,
        )


def fragments_of_b(b, kind):
    k = len(b)
    found = np.empty((32, k // 4), np.float32)
    for lane, i in np.ndindex(found.shape):
        found[lane, i] = b[lane % 4 * 2 + i % 2 + 8 * (i // 2), lane // 4]
    return found.astype(DTYPES[kind]).view(np.uint32)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("k", [8, 16])
def test_mma(k, kind):
    a, b, c = small(0, 16, k), small(1, k, 8), small(2, 32, 4)
    body = load(0, 1, k // 4) + load(1, 10, k // 8) + load(2, 20, 4)
    body += f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {registers(30, 4)}, "
    body += f"{registers(1, k // 4)}, {registers(10, k // 8)}, {registers(20, 4)};\n"
    operands = [fragments_of_a(a, kind), fragments_of_b(b, kind), c]
    [found] = run(body + store(3, 30, 4), operands, [((32, 4), "f4")])
    np.testing.assert_array_equal(matrix_of(found, 16), a @ b + matrix_of(c, 16))
    body = body.replace("mma.", "setp.lt.u32 %p1, %t, 8; @%p1 mma.")
    with pytest.raises(Fault, match="a product without some"):
        run(body, operands, [((32, 4), "f4")])
