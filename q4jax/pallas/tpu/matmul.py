"""The kernel of `x @ W.T + bias`: a tile of W is decoded in registers and multiplied at once."""

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
from q4jax.pallas.tpu.operands import ScaleRows, columns, stack_of, weight_operands
from q4jax.pallas.tpu.order import as_decoded, zero_from


def linear(
    x: Array,
    arrays: WeightArrays,
    bias: Array | None,
    layer: Array | None,
    *,
    spec: QuantSpec,
    interpret: Interpret,
    tile: tiles.Tile | None = None,
) -> Array:
    """[M, K] -> [M, N] in x's dtype; sums over K in float32.

    Args:
      x: the activation, float32 or bfloat16.
      arrays: of a weight, or of a stack where `layer` is given.
      bias: `[N]`.
      layer: int32 scalar, which weight of the stack.
      spec: of the weight.
      interpret: simulate the kernel.
      tile: None: `tiles.choose`.
    """
    stack = stack_of(arrays, spec, layer, interpret=interpret)
    (n, k), m = stack.shape, x.shape[0]
    tile = tile or tiles.choose(m, n, k, x.dtype, transpose=False)
    x = columns(x, k)
    rows = ScaleRows(spec.blocksize, tile.k, stack.scales.shape[1])
    operands: list[tuple[Any, Any, Any]] = [
        (x, (tile.m, tile.k), lambda i, j, s, _: (i, s)),
        *weight_operands(stack, rows, tile, lambda j, s: (s, j)),
    ]
    if bias is not None:
        wide = columns(bias.astype(jnp.float32)[None], n)
        operands.append((wide, (1, tile.n), lambda i, j, s, _: (0, j)))
    y = launch(
        "linear",
        functools.partial(_kernel, spec=spec, tile=tile, rows=rows, k=k),
        (stack.layer,),
        operands,
        jax.ShapeDtypeStruct((m, n), x.dtype),
        ((tile.m, tile.n), lambda i, j, s, _: (i, j)),
        (pl.cdiv(m, tile.m), pl.cdiv(n, tile.n), pl.cdiv(k, tile.k)),
        interpret=interpret,
        scratch=[pltpu.VMEM((tile.m, tile.n), jnp.float32)],
        sums=1,
    )
    return y[:, : spec.shape[0]]


def _kernel(
    _: Any,
    x_ref: Any,
    packed_ref: Any,
    scales_ref: Any,
    *refs: Any,
    spec: QuantSpec,
    tile: tiles.Tile,
    rows: ScaleRows,
    k: int,
    interpret: bool,
) -> None:
    *bias_ref, y_ref, sum_ref = refs
    step, steps = pl.program_id(2), pl.num_programs(2)
    limit = None if k % tile.k == 0 else k // spec.blocksize

    @pl.when(step == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x = x_ref[...]
    if limit is not None:  # what is outside meets scales of zero, and must be finite
        x = zero_from(x, k - step * tile.k)
    x = as_decoded(x, x.dtype, interpret=interpret)
    for first in range(0, tile.n, tile.columns):
        where = pl.ds(first, tile.columns)
        w = decode_tile(
            packed_ref[:, where],
            rows.reader(scales_ref, where, step, limit=limit),
            quant_type=spec.quant_type,
            blocksize=spec.blocksize,
            dtype=x.dtype,
            interpret=interpret,
        )
        sum_ref[:, where] += jnp.dot(
            x, w, precision=precision(x.dtype), preferred_element_type=jnp.float32
        )

    @pl.when(step == steps - 1)
    def _end() -> None:
        total = sum_ref[...]
        if bias_ref:
            total += bias_ref[0][...]
        y_ref[...] = total.astype(y_ref.dtype)


def precision(dtype: Any) -> lax.Precision:
    """The precision of a product: bfloat16 is exact at the default one."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
