"""The kernel of `g @ W`: the gradient of `x @ W.T` in x."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.pallas.tpu import tiles
from q4jax.pallas.tpu.decode import decode_tile
from q4jax.pallas.tpu.launch import Interpret, launch
from q4jax.pallas.tpu.matmul import precision
from q4jax.pallas.tpu.operands import ScaleRows, columns, stack_of, weight_operands
from q4jax.pallas.tpu.order import as_stored, zero_from


def linear_transpose(
    g: Array,
    arrays: WeightArrays,
    layer: Array | None,
    *,
    spec: QuantSpec,
    interpret: Interpret,
    tile: tiles.Tile | None = None,
) -> Array:
    """[M, N] -> [M, K] in g's dtype; sums over N in float32.

    Args:
      g: float32 or bfloat16.
      arrays: of a weight, or of a stack where `layer` is given.
      layer: int32 scalar, which weight of the stack.
      spec: of the weight.
      interpret: simulate the kernel.
      tile: None: `tiles.choose`.
    """
    stack = stack_of(arrays, spec, layer, interpret=interpret)
    (n, k), m = stack.shape, g.shape[0]
    tile = tile or tiles.choose(m, n, k, g.dtype, transpose=True)
    rows = ScaleRows(spec.blocksize, tile.k, stack.scales.shape[1])
    dx = launch(
        "linear_transpose",
        functools.partial(_kernel, spec=spec, tile=tile, rows=rows, n=n),
        (stack.layer,),
        [
            (columns(g, n), (tile.m, tile.n), lambda i, j, s, _: (i, s)),
            *weight_operands(stack, rows, tile, lambda j, s: (j, s)),
        ],
        jax.ShapeDtypeStruct((m, k), g.dtype),
        ((tile.m, tile.k), lambda i, j, s, _: (i, j)),
        (pl.cdiv(m, tile.m), pl.cdiv(k, tile.k), pl.cdiv(n, tile.n)),
        interpret=interpret,
        scratch=[pltpu.VMEM((tile.m, tile.k), jnp.float32)],
        sums=1,
    )
    return dx[:, : spec.shape[1]]


def _kernel(
    _: Any,
    g_ref: Any,
    packed_ref: Any,
    scales_ref: Any,
    dx_ref: Any,
    sum_ref: Any,
    *,
    spec: QuantSpec,
    tile: tiles.Tile,
    rows: ScaleRows,
    n: int,
    interpret: bool,
) -> None:
    number, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for first in range(0, tile.n, tile.columns):
        where = pl.ds(first, tile.columns)
        g, inside = g_ref[:, where], None
        if n % tile.n:  # what is outside meets zeros on both sides
            left = n - step * tile.n - first
            inside = lax.broadcasted_iota(jnp.int32, (1, tile.columns), 1) < left
            g = zero_from(g, left)
        w = decode_tile(
            packed_ref[:, where],
            rows.reader(scales_ref, where, number, inside=inside),
            quant_type=spec.quant_type,
            blocksize=spec.blocksize,
            dtype=g.dtype,
            interpret=interpret,
        )
        sum_ref[...] += lax.dot_general(
            g,
            w,
            (((1,), (1,)), ((), ())),
            precision=precision(g.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when(step == steps - 1)
    def _end() -> None:
        rounded = sum_ref[...].astype(dx_ref.dtype)
        dx_ref[...] = as_stored(rounded, dx_ref.dtype, interpret=interpret)
