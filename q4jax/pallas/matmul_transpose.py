"""The kernel of `g @ W`, the gradient of `x @ W.T`: tiles of W decoded where they are used."""

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
from q4jax.gpu.tiling import HALF, Tiling
from q4jax.pallas.launch import add_splits, below, launch, load
from q4jax.pallas.weight_tile import activation_part, decode_tile, load_indices, operands


def linear_transpose(
    g: Array,
    arrays: WeightArrays | ArraysInStack,
    *,
    spec: QuantSpec,
    tile: tiles.Tile,
    interpret: bool,
) -> Array:
    """[M, N] -> [M, K] in g's dtype.

    A program computes `tile.m` x `tile.k` outputs, one accumulator for each half of the tile, over
    its share of N; shares are added as in `linear`.
    """
    m, (n, k) = g.shape[0], spec.shape
    steps = pl.cdiv(pl.cdiv(n, tile.n), tile.splits)
    inside = n == tile.n * steps * tile.splits and k % tile.k == 0
    tiling = Tiling(spec, tile.n, tile.k, inside)
    named = operands(arrays, tiling) | {"g": g}
    dtype = jnp.float32 if tile.splits > 1 else g.dtype
    dx = launch(
        "linear_transpose",
        functools.partial(_kernel, tiling=tiling, tile=tile, steps=steps, dtype=g.dtype),
        named,
        jax.ShapeDtypeStruct((tile.splits, m, k // tiling.unit, tiling.unit), dtype),
        (pl.cdiv(m, tile.m), pl.cdiv(k, tile.k) * tile.splits),
        interpret=interpret,
        warps=tile.warps,
        stages=tile.stages,
    )
    return add_splits(dx.reshape(tile.splits, m, k), None, g.dtype)


def _kernel(
    named: dict[str, Any], dx_ref: Any, *, tiling: Tiling, tile: tiles.Tile, steps: int, dtype: Any
) -> None:
    m, n = named["g"].shape
    first_m = pl.program_id(0) * tile.m
    column = pl.program_id(1) // tile.splits
    split = pl.program_id(1) % tile.splits
    named = load_indices(named)

    def step(i: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        row = (split * steps + i) * tile.n
        halves = decode_tile(named, tiling, row, column, dtype)  # [tile.n, k / halves] each
        mask = None
        if m % tile.m or not tiling.inside:
            shape = (tile.m, tile.n)
            mask = below(shape, 0, first_m, m) & below(shape, 1, row, n)
        g = load(named["g"].at[pl.ds(first_m, tile.m), pl.ds(row, tile.n)], mask)
        return tuple(
            total
            + lax.dot_general(
                g,
                weights,
                (((1,), (0,)), ((), ())),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            for total, weights in zip(totals, halves, strict=True)
        )

    zeros = (jnp.zeros((tile.m, tiling.units * HALF), jnp.float32),) * tiling.halves
    for half, total in enumerate(lax.fori_loop(0, steps, step, zeros)):
        where, mask = activation_part(dx_ref.shape[1:], tiling, first_m, tile.m, column, half)
        dx = total.reshape(tile.m, tiling.units, HALF).astype(dx_ref.dtype)
        triton().store(dx_ref.at[(split, *where)], dx, mask=mask)
