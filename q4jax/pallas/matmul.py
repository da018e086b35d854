"""The kernel of `x @ W.T + bias`: a tile of W is decoded in registers and multiplied at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.gpu import tiles
from q4jax.gpu.requirements import triton
from q4jax.gpu.tiling import Tiling
from q4jax.pallas.launch import add_splits, below, launch, load, rows_inside
from q4jax.pallas.weight_tile import decode_tile, load_activation, load_indices, operands


def linear(
    x: Array,
    arrays: WeightArrays | ArraysInStack,
    bias: Array | None,
    *,
    spec: QuantSpec,
    tile: tiles.Tile,
    interpret: bool,
) -> Array:
    """[M, K] -> [M, N] in x's dtype.

    A program computes `tile.n` x `tile.m` outputs over its share of K: the weight is the left
    operand, [tile.n, tile.k], so that 16 columns of x cost it nothing more than one. Where there
    are too few tiles to fill a GPU, K is split over `tile.splits` programs, whose sums in float32
    are added in one order: the result does not depend on which ends first.
    """
    m, (n, k) = x.shape[0], spec.shape
    steps = pl.cdiv(pl.cdiv(k, tile.k), tile.splits)
    inside = n % tile.n == 0 and k == tile.k * steps * tile.splits
    tiling = Tiling(spec, tile.n, tile.k, inside)
    split = tile.splits > 1
    named = operands(arrays, tiling) | {"x": tiling.activation(x)}
    if bias is not None and not split:
        named["bias"] = bias
    y = launch(
        "linear",
        functools.partial(_kernel, tiling=tiling, tile=tile, steps=steps, dtype=x.dtype),
        named,
        jax.ShapeDtypeStruct((tile.splits, m, n), jnp.float32 if split else x.dtype),
        (pl.cdiv(m, tile.m), pl.cdiv(n, tile.n) * tile.splits),
        interpret=interpret,
        warps=tile.warps,
        stages=tile.stages,
    )
    return add_splits(y, bias, x.dtype)


def _kernel(
    named: dict[str, Any], y_ref: Any, *, tiling: Tiling, tile: tiles.Tile, steps: int, dtype: Any
) -> None:
    _, m, n = y_ref.shape
    first_m = pl.program_id(0) * tile.m
    first_n = pl.program_id(1) // tile.splits * tile.n
    split = pl.program_id(1) % tile.splits
    named = load_indices(named)

    def step(i: Any, total: Array) -> Array:
        number = split * steps + i
        halves = decode_tile(named, tiling, first_n, number, dtype)  # [tile.n, k / halves] each
        for half, weights in enumerate(halves):
            xs = load_activation(named["x"], tiling, first_m, tile.m, number, half)
            total += lax.dot_general(
                weights,
                xs,
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
        return total

    total = lax.fori_loop(0, steps, step, jnp.zeros((tile.n, tile.m), jnp.float32))
    y = total.T  # [tile.m, tile.n]
    if "bias" in named:
        bias = load(named["bias"].at[pl.ds(first_n, tile.n)], rows_inside((tile.n,), first_n, n))
        y += bias.astype(jnp.float32)[None, :]
    mask = None
    if m % tile.m or n % tile.n:
        mask = below(y.shape, 0, first_m, m) & below(y.shape, 1, first_n, n)
    where = (split, pl.ds(first_m, tile.m), pl.ds(first_n, tile.n))
    triton().store(y_ref.at[where], y.astype(y_ref.dtype), mask=mask)
