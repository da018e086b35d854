"""The kernel that decodes nested scales, once a call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from q4jax.core import blockwise, codebooks
from q4jax.pallas.tpu.launch import Interpret, launch
from q4jax.pallas.tpu.registers import LANES, look_up

_ROWS, _COLUMNS = 256, 512


def decode_scales(
    layer: Array, codes: Array, nested: Array, offset: Array, *, interpret: Interpret
) -> Array:
    """Decode the scales of one weight: float32 `[1, K / blocksize, N]`.

    Args:
      layer: int32 `[1]`, which codes.
      codes: uint8 `[L, K / blocksize, N]`.
      nested: float32, one for each 256 scales in the order of the rows of the weight.
      offset: float32 scalar.
      interpret: simulate the kernel.
    """
    _, blocks, n = codes.shape
    spread = _spread(nested, blocks, n)
    rows = blocks if blocks <= _ROWS else _ROWS
    width = n if n <= _COLUMNS else _COLUMNS
    height = 1 if spread.shape[0] == 1 else rows
    return launch(
        "scales",
        _kernel,
        (layer,),
        [
            (codes, (None, rows, width), lambda j, i, layer: (layer[0], i, j)),
            (spread, (height, width), lambda j, i, _: (0 if height == 1 else i, j)),
            (offset.reshape(1, 1), pl.BlockSpec(memory_space=pltpu.SMEM), None),
            (codebooks.DYNAMIC_MAP.reshape(2, LANES), (2, LANES), lambda j, i, _: (0, 0)),
        ],
        jax.ShapeDtypeStruct((1, blocks, n), jnp.float32),
        ((None, rows, width), lambda j, i, _: (0, i, j)),
        (pl.cdiv(n, width), pl.cdiv(blocks, rows)),
        interpret=interpret,
    )


def _spread(nested: Array, blocks: int, n: int) -> Array:
    """The nested scale of each scale, `[blocks, N]`; `[1, N]` where a row has only one."""
    group = codebooks.NESTED_BLOCKSIZE
    if group % blocks == 0:
        return jnp.repeat(nested, group // blocks)[None, :n]
    return jnp.repeat(nested, group)[: n * blocks].reshape(n, blocks).T


def _kernel(
    _: Any,
    codes_ref: Any,
    nested_ref: Any,
    offset_ref: Any,
    map_ref: Any,
    out_ref: Any,
    *,
    interpret: bool,
) -> None:
    offset = offset_ref[0, 0]
    width = codes_ref.shape[1]
    find = functools.partial(look_up, axis=1, interpret=interpret)
    for first in range(0, width, LANES):
        lanes = pl.ds(first, min(LANES, width - first))
        codes = codes_ref[:, lanes].astype(jnp.int32)
        short = LANES - codes.shape[1]
        index = jnp.pad(codes, ((0, 0), (0, short))) if short else codes
        low, high = (jnp.broadcast_to(map_ref[half : half + 1], index.shape) for half in (0, 1))
        value = jnp.where(index < LANES, find(low, index), find(high, index))
        value = value[:, : codes.shape[1]]
        nested = jnp.broadcast_to(nested_ref[:, lanes], value.shape)
        out_ref[:, lanes] = blockwise.scale(value, nested, offset)
