"""Codes of 4 bits, decoded straight into the registers that `wgmma` takes its operand A from.

Of each 16 columns of A a thread holds 4, for 2 rows: columns 2q, 2q + 1, 2q + 8 and 2q + 9, where q
is its number in a quad. A thread that loads 16 bytes of codes has 32 neighbours of a row instead.
Which columns of W meet which of x is free, though, as long as they are the same: `permute` puts
the columns of x into the order in which threads have those of W. So no weight changes its thread,
and none passes through shared memory after it was decoded.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays, decode_absmax
from q4jax.core.spec import QuantSpec
from q4jax.pallas.mosaic_gpu.thread import Thread

ROWS = 64
"""The rows of A."""
PART = 64
"""The columns of x that one row of swizzled shared memory holds, 128 bytes."""
DEPTH = 16
"""The columns of A that one `wgmma` takes."""
TRANSPOSED_WORDS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
"""How codes lie in shared memory for `decode_transposed`."""
QUAD = 4
"""The threads that share a row."""


def operands(
    arrays: WeightArrays | ArraysInStack, spec: QuantSpec, weights: int
) -> tuple[Array, Array, Array | None]:
    """The arrays that kernels read of a weight [N, K].

    Args:
      arrays: the weight's, or a stack's of `count` weights.
      spec: of the weight.
      weights: of a row, that share a scale.

    Returns:
      Words of 8 codes, int32 [N, K / 8] or [count N, K / 8]; float32 scales [N, K / weights]; and
      int32 [1], the first of the weight's rows of words, or None where there are no others.
    """
    n, k = spec.shape
    first = None
    if isinstance(arrays, ArraysInStack):
        stack, number = arrays.flat()

        def cut(array: Array) -> Array:
            return lax.dynamic_index_in_dim(array, number, keepdims=False)

        packed, absmax, nested, offset = stack
        if absmax.ndim == packed.ndim:  # otherwise it is the weight's own
            absmax = cut(absmax)
        arrays = WeightArrays(packed, absmax, *jax.tree.map(cut, (nested, offset)))
        first = (number * n).reshape(1)
    words = lax.bitcast_convert_type(arrays.packed.reshape(-1, k // 8, 4), jnp.int32)
    absmax = decode_absmax(arrays.absmax, arrays.nested_absmax, arrays.offset).reshape(n, -1)
    return words, jnp.repeat(absmax, spec.blocksize // weights, axis=1), first


def permute(x: Array, columns: int) -> Array:
    """Put the columns [M, K] of an activation into the order of `decode`, `columns` at a time."""
    m, k = x.shape
    x = x.reshape(m, k // columns, QUAD, columns // DEPTH, 2, 2)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(m, k)


def word_transforms(columns: int) -> tuple[Any, ...]:
    """How codes lie in shared memory, so that threads which load at once meet different banks."""
    if columns == 128:
        return ()  # 2 rows of 64 bytes have all banks
    return plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)


def decode(words: Any, scales: Any, *, columns: int, quant_type: str, dtype: Any) -> list[Array]:
    """Decode the 64 rows of a warp group to parts [64, 64] of columns as `permute` orders them.

    Args:
      words: reference to int32 [64 groups, columns / 8] in shared memory, 8 codes each.
      scales: reference to float32 [64 groups, 4] in shared memory: of each quarter of a row.
      columns: 128 or 256.
      quant_type: "nf4" or "fp4".
      dtype: bfloat16 or float16.
    """
    part = plgpu.ShapeDtypeStruct((ROWS, PART), dtype, layout=plgpu.Layout.WGMMA)
    references = plgpu.RefType(word_transforms(columns)), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=references, return_type=[part] * (columns // PART))
    def run(_: Any, words: Any, scales: Any) -> list[Any]:
        thread = Thread(quant_type, dtype)
        rows = [_pairs_of_row(thread, words, scales, below, columns) for below in (0, 8)]
        return [_part(thread, rows, number) for number in range(columns // PART)]

    return run(words, scales)


def _pairs_of_row(thread: Thread, words: Any, scales: Any, below: int, columns: int) -> list[Any]:
    """The thread's weights of a row."""
    row = thread.sum((thread.warp, 16), (thread.eighth, 1), (thread.constant(below), 1))
    loads, codes = columns // 128, []
    for load in range(loads):
        piece = thread.sum((thread.quad, loads), (thread.constant(load), 1))
        if word_transforms(columns):
            piece = arith.xori(piece, thread.eighth)  # the row's place among 8
        codes += thread.words(words, thread.sum((row, columns // 2), (piece, 16)), 4)
    scale = thread.scale(scales, thread.sum((row, 4 * QUAD), (thread.quad, 4)))
    return thread.pairs(codes, scale)


def _part(thread: Thread, rows: list[list[Any]], number: int) -> Any:
    """A part of the tile; each pair of a row comes after 8 columns of all threads."""
    registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((ROWS, PART)), object)
    columns = PART // 8
    for at, (column, row) in enumerate(np.ndindex(columns, 2)):
        registers.flat[at] = rows[row][columns * number + column]
    return thread.array(registers)


def decode_transposed(
    words: Any, scales: Any, first: int, *, columns: int, block: int, quant_type: str, dtype: Any
) -> Array:
    """Decode 16 rows of a tile to the transposed weight [columns, 16], rows as `restore` has them.

    Threads decode neighbours of a row, as above, and `movmatrix` transposes 8 x 8 of them between
    the threads of a warp.

    Args:
      words: reference to int32 [rows, columns / 8] in shared memory.
      scales: reference to float32 [rows, columns / block] in shared memory.
      first: the first row.
      columns: 256 or 512, of which a thread has a sixteenth.
      block: the weights of a scale, at least a sixteenth of the columns.
      quant_type: "nf4" or "fp4".
      dtype: bfloat16 or float16.
    """
    kind = plgpu.ShapeDtypeStruct((columns, DEPTH), dtype, layout=plgpu.Layout.WGMMA)
    references = plgpu.RefType(TRANSPOSED_WORDS), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=references, return_type=kind)
    def run(_: Any, words: Any, scales: Any) -> Any:
        thread = Thread(quant_type, dtype)
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape((columns, DEPTH)), object)
        for half in (0, 1):  # 8 rows each
            row = first // 8 + half
            pairs = _pairs_to_transpose(thread, words, scales, row, columns, block)
            for number, pair in enumerate(pairs):
                moved = thread.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "r", pair)
                # Tile of 64, 8 columns, and rows 8 apart are the axes that are not one thread's.
                registers.reshape(columns // 64, 2, 2)[number // 2, half, number % 2] = moved
        return thread.array(registers)

    return run(words, scales)


def _pairs_to_transpose(
    thread: Thread, words: Any, scales: Any, row: int, columns: int, block: int
) -> list[Any]:
    """The thread's weights of its row among rows 8 `row` to 8 `row` + 7."""
    size = columns // 32  # bytes of a thread: 8 or 16
    start = thread.sum((thread.warp, 4 * size), (thread.quad, size))
    # Boxes of 8 rows and 128 bytes, whose pieces of 16 bytes are swizzled.
    box = thread.sum((thread.shift_right(start, 7), 1), (thread.constant(row * columns // 256), 1))
    inside = arith.andi(start, thread.constant(127))
    inside = arith.xori(inside, thread.sum((thread.eighth, 16)))
    where = thread.sum((box, 1024), (thread.eighth, 128), (inside, 1))
    number = thread.shift_right(start, (block // 2).bit_length() - 1)
    place = thread.sum((thread.constant(8 * row), 1), (thread.eighth, 1))
    scale = thread.scale(scales, thread.sum((place, 4 * (columns // block)), (number, 4)))
    return thread.pairs(thread.words(words, where, size // 4), scale)


def restore(rows: Array, columns: int) -> Array:
    """Put the rows [K, M] of transposed products into the order of the columns of W."""
    k, m = rows.shape
    rows = rows.reshape(k // columns, columns // 64, 4, 2, QUAD, 2, m)
    return rows.transpose(0, 2, 4, 1, 3, 5, 6).reshape(k, m)
