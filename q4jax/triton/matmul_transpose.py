"""The kernel of `g @ W`, the gradient of `x @ W.T`: tiles of W decoded where they are used."""

import triton
import triton.language as tl

from q4jax.triton.weight_tile import (
    WIDTH,
    below,
    decode_half,
    decode_tables,
    first_row,
    half_columns,
    load,
    load_words,
    stride,
)


@triton.jit
def linear_transpose(g, packed, absmax, nested, offset, dynamic_map, m, dx, PLAN: tl.constexpr):
    """A program computes `tile.m` x `tile.k` outputs over its share of N.

    It has a sum for each half of the tile.

    Args:
      g: [batch, m, N].
      packed, absmax, nested, offset, dynamic_map: as for `linear`.
      m: rows of g.
      dx: [batch, splits, m, K].
      PLAN: as for `linear`.
    """
    T: tl.constexpr = PLAN.tiling
    TILE: tl.constexpr = PLAN.tile
    HALVES: tl.constexpr = T.halves
    n: tl.constexpr = T.shape[0]
    k: tl.constexpr = T.shape[1]
    m_tiles = tl.cdiv(m, TILE.m)
    number = tl.program_id(0)
    first_m = first_row(number % m_tiles, TILE.m, m)
    number = number // m_tiles
    split = number % TILE.splits
    number = number // TILE.splits
    tile = number % tl.cdiv(k, TILE.k)
    batch = (number // tl.cdiv(k, TILE.k)).to(tl.int64)
    g += batch * m * stride(PLAN, "g") + first_m.to(tl.int64) * n
    packed += batch * stride(PLAN, "packed")
    absmax += batch * stride(PLAN, "absmax")
    if nested is not None:
        nested += batch * stride(PLAN, "nested")
        offset = tl.load(offset + batch * stride(PLAN, "offset"))

    rows = tl.arange(0, TILE.m)[:, None]
    columns = tl.arange(0, TILE.n)[None, :]
    mask_m = below(first_m + rows, m, PLAN.masked_m, None)
    first = tl.zeros((TILE.m, T.units * WIDTH), tl.float32)
    second = tl.zeros((TILE.m, T.units * WIDTH), tl.float32)
    for i in range(PLAN.steps):
        row = (split * PLAN.steps + i) * TILE.n
        tables = decode_tables(absmax, nested, offset, dynamic_map, row, tile, PLAN)
        mask = below(row + columns, n, PLAN.masked_n, mask_m)
        gs = load(g + (rows * n + row + columns), mask)
        words = load_words(packed, row, tile, 0, PLAN)
        weights = decode_half(words, tables, g.dtype.element_ty, PLAN)
        first = tl.dot(gs, weights, first, input_precision="ieee")
        if HALVES == 2:
            words = load_words(packed, row, tile, 1, PLAN)
            weights = decode_half(words, tables, g.dtype.element_ty, PLAN)
            second = tl.dot(gs, weights, second, input_precision="ieee")

    dx += (batch * TILE.splits + split) * m * k + first_m.to(tl.int64) * k
    for half in tl.static_range(HALVES):
        total = second if half else first
        columns = half_columns(tile, half, PLAN)
        mask = below(columns, k, PLAN.masked_k, mask_m)
        tl.store(dx + (rows * k + columns), total.to(dx.dtype.element_ty), mask=mask)
