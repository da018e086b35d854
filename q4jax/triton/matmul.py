"""The kernel of `x @ W.T + bias`: a tile of W is decoded in registers and multiplied at once."""

import triton
import triton.language as tl

from q4jax.triton.weight_tile import (
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
def linear(x, packed, absmax, nested, offset, dynamic_map, bias, m, y, PLAN: tl.constexpr):
    """A program computes `tile.n` x `tile.m` outputs over its share of K.

    The weight is the left operand, so that 16 columns of x cost it nothing more than one. Programs
    with neighbouring numbers share weights.

    Args:
      x: [batch, m, K].
      packed, absmax, nested, offset: weights [batch, N, K]; the last two may be None.
      dynamic_map: the 8-bit map [256], or None.
      bias: [batch, N] or None.
      m: rows of x.
      y: [batch, splits, m, N].
      PLAN: see `plan.Plan`; for every array it says whether there is one, not a batch.
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
    first_n = first_row(number % tl.cdiv(n, TILE.n), TILE.n, n)
    batch = (number // tl.cdiv(n, TILE.n)).to(tl.int64)
    x += batch * m * stride(PLAN, "x")
    packed += batch * stride(PLAN, "packed")
    absmax += batch * stride(PLAN, "absmax")
    if nested is not None:
        nested += batch * stride(PLAN, "nested")
        offset = tl.load(offset + batch * stride(PLAN, "offset"))

    rows_m = tl.arange(0, TILE.m)[:, None]
    x += first_m.to(tl.int64) * k
    mask_m = below(first_m + rows_m, m, PLAN.masked_m, None)
    total = tl.zeros((TILE.n, TILE.m), tl.float32)
    for i in range(PLAN.steps):
        tile = split * PLAN.steps + i
        tables = decode_tables(absmax, nested, offset, dynamic_map, first_n, tile, PLAN)
        for half in tl.static_range(HALVES):
            words = load_words(packed, first_n, tile, half, PLAN)
            weights = decode_half(words, tables, x.dtype.element_ty, PLAN)
            columns = half_columns(tile, half, PLAN)
            xs = load(x + (rows_m * k + columns), below(columns, k, PLAN.masked_k, mask_m))
            total = tl.dot(weights, tl.trans(xs), total, input_precision="ieee")

    rows = first_n + tl.arange(0, TILE.n)[:, None]
    columns = tl.arange(0, TILE.m)[None, :]
    if bias is not None:
        bias += batch * stride(PLAN, "bias")
        total += load(bias + rows, below(rows, n, PLAN.masked_n, None)).to(tl.float32)
    y += (batch * TILE.splits + split) * m * n + first_m.to(tl.int64) * n
    mask = below(rows, n, PLAN.masked_n, below(first_m + columns, m, PLAN.masked_m, None))
    tl.store(y + columns * n + rows, total.to(y.dtype.element_ty), mask=mask)
