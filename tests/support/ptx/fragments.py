"""Matrices for the tests of products: how fragments hold them, and programs' pieces."""

import ml_dtypes
import numpy as np

DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


def small(seed, *shape):
    """Integers whose products and sums are exact in every format."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def registers(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def load(array, first, count):
    """Statements that load `count` words a thread."""
    text = f"mul.wide.u32 %d8, %i, {4 * count}; add.s64 %d9, %a{array}, %d8;\n"
    return text + "".join(f"ld.global.b32 %r{first + i}, [%d9+{4 * i}];\n" for i in range(count))


def store(array, first, count):
    """The other way."""
    text = f"mul.wide.u32 %d8, %i, {4 * count}; add.s64 %d9, %a{array}, %d8;\n"
    return text + "".join(f"st.global.b32 [%d9+{4 * i}], %r{first + i};\n" for i in range(count))


def fragments_of_a(a, kind):
    """[16 a warp, k] -> words [threads, k / 4], by the manual's formulas for element i."""
    warps, k = len(a) // 16, a.shape[1]
    found = np.empty((warps, 32, k // 2), np.float32)
    for warp, lane, i in np.ndindex(found.shape):
        row = lane // 4 + 8 * (i // 2 % 2)
        column = lane % 4 * 2 + i % 2 + 8 * (i // 4)
        found[warp, lane, i] = a[16 * warp + row, column]
    return found.reshape(-1, k // 2).astype(DTYPES[kind]).view(np.uint32)


def matrix_of(fragments, rows):
    """Accumulators float32 [threads, n / 2] -> [rows, n]."""
    n = 2 * fragments.shape[1]
    found = np.full((rows, n), np.nan, np.float32)
    for thread, i in np.ndindex(fragments.shape):
        warp, lane = divmod(thread, 32)
        row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
        found[row, 8 * (i // 4) + lane % 4 * 2 + i % 2] = fragments[thread, i]
    return found
