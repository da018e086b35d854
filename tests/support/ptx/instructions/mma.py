"""Matrices of 8 x 8 halves between shared memory and registers, and products of a warp."""

import numpy as np

from tests.support.ptx.instructions.loads import registers_of
from tests.support.ptx.instructions.table import executes
from tests.support.ptx.scalar_types import halves

ROW = 16  # bytes of a row of a matrix: 8 halves


def _rows(machine, operand, count):
    """The addresses of the rows, of which lane i names the i-th: [warps, count, 8], and whose."""
    machine.whole(32, "a matrix")
    lanes = machine.lanes
    naming = lanes[lanes % 32 < 8 * count]
    offsets = machine.shared.offsets(machine.address(operand, naming), ROW, naming)
    return offsets, naming


def _define_matrices(count, transposed):
    suffix = f"x{count}{'.trans' if transposed else ''}.shared.b16"

    @executes(f"ldmatrix.sync.aligned.m8n8.{suffix}", counts=(2,))
    def load(machine, target, source):
        """Lane i gets elements 2i % 8 and the next of row i / 4 of each matrix."""
        offsets, naming = _rows(machine, source, count)
        rows = machine.shared.load(offsets, ROW, naming).view(np.uint16)
        matrices = rows.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for i, register in enumerate(registers_of(target, count)):
            value = np.zeros(machine.count, np.uint32)
            value[machine.lanes] = words[:, i].reshape(-1)
            machine.put(register, value)

    @executes(f"stmatrix.sync.aligned.m8n8.{suffix}", counts=(2,))
    def store(machine, target, source):
        """The other way."""
        offsets, naming = _rows(machine, target, count)
        lanes = machine.lanes
        words = [machine.each(r, "b32")[lanes] for r in registers_of(source, count)]
        elements = np.stack(words).view(np.uint16).reshape(count, -1, 8, 8)
        if transposed:
            elements = elements.swapaxes(2, 3)
        rows = np.ascontiguousarray(elements.swapaxes(0, 1)).reshape(-1, 8)
        machine.shared.store(offsets, rows.view(np.uint8), naming)


for count in (1, 2, 4):
    _define_matrices(count, False)
    _define_matrices(count, True)


def pairs(machine, registers, kind):
    """Registers of two halves -> float32 [threads, registers, 2]."""
    words = np.stack([machine.each(register, "b32") for register in registers], -1)
    return halves(words, kind)


def accumulators(machine, registers):
    """float32 [threads, registers]."""
    return np.stack([machine.each(register, "f32") for register in registers], -1)


def left_operand(fragments, rows):
    """Fragments [threads, 2 * columns of 8, 2] of A -> [n, rows, columns]; rows are 16 a warp.

    Lane 4g + t has in register r row g + 8 (r % 2), columns 2t + 8 (r // 2) and the next.
    """
    warps = rows // 16
    a = fragments.reshape(-1, warps, 8, 4, fragments.shape[1] // 2, 2, 2)
    a = a.transpose(0, 1, 5, 2, 4, 3, 6)  # n, warp, r % 2, g, r // 2, t, pair
    return a.reshape(a.shape[0], rows, -1)


def accumulator_fragments(matrix):
    """[n, 16 a warp, columns] -> [threads, columns / 2].

    Lane 4g + t has of each 8 columns 2t and the next, first of row g, then of row g + 8.
    """
    n, rows, columns = matrix.shape
    parts = matrix.reshape(n, rows // 16, 2, 8, columns // 8, 4, 2)
    return parts.transpose(0, 1, 3, 5, 4, 2, 6).reshape(-1, columns // 2)


def accumulator_matrix(fragments, rows):
    """The other way."""
    parts = fragments.reshape(-1, rows // 16, 8, 4, fragments.shape[1] // 4, 2, 2)
    parts = parts.transpose(0, 1, 5, 2, 4, 3, 6)
    return parts.reshape(parts.shape[0], rows, -1)


def multiply_add(left, right, total):
    """`left @ right + total`, rounded once to float32, so that its place in a tile is no matter."""
    with np.errstate(over="ignore"):
        return (np.matmul(left, right, dtype=np.float64) + total).astype(np.float32)


def _define_product(k, kind):
    @executes(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32", counts=(4,))
    def product(machine, target, a, b, c):
        """[16, k] times [k, 8], plus [16, 8]."""
        machine.whole(32, "a product")
        left = left_operand(pairs(machine, registers_of(a, k // 4), kind), 16)
        # Lane 4g + t has in register r rows 2t + 8r and the next, of column g.
        right = pairs(machine, registers_of(b, k // 8), kind).reshape(-1, 8, 4, k // 8, 2)
        right = right.transpose(0, 3, 2, 4, 1).reshape(-1, k, 8)
        total = accumulator_matrix(accumulators(machine, registers_of(c, 4)), 16)
        result = accumulator_fragments(multiply_add(left, right, total))
        for i, register in enumerate(registers_of(target, 4)):
            machine.put(register, result[:, i])


for kind in ("f16", "bf16"):
    _define_product(8, kind)
    _define_product(16, kind)
