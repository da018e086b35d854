"""The Pallas kernel of `dequantize_4bit`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.gpu.requirements import triton
from q4jax.pallas.launch import launch, load, rows_inside
from q4jax.pallas.weight_tile import decode_words, load_scales, nested_operands, tables

_TILE_WORDS = 512


def dequantize(arrays: WeightArrays, *, spec: QuantSpec, dtype: Any, interpret: bool) -> Array:
    """Decode the weight to `dtype`, in its full shape.

    The weight is a list of blocks to this kernel, whatever its shape.
    """
    if arrays.offset is not None and arrays.offset.ndim:
        one = functools.partial(dequantize, spec=spec, dtype=dtype, interpret=interpret)
        return jax.vmap(one)(arrays)
    words = spec.blocksize // 8
    blocks = arrays.absmax.size
    tile = (max(1, _TILE_WORDS // words), min(words, _TILE_WORDS))
    packed = arrays.packed.reshape(blocks, words, 4)
    named = {
        "words": lax.bitcast_convert_type(packed, jnp.int32),
        "absmax": arrays.absmax.reshape(blocks),
    } | nested_operands(arrays)
    w = launch(
        "dequantize",
        functools.partial(_kernel, tile=tile, quant_type=spec.quant_type, dtype=dtype),
        named,
        jax.ShapeDtypeStruct((blocks, words, 8), dtype),
        (pl.cdiv(blocks, tile[0]),),
        interpret=interpret,
    )
    lead = arrays.packed.shape[: arrays.packed.ndim - len(spec.packed_shape)]
    return w.reshape(*lead, *spec.shape)


def _kernel(
    named: dict[str, Any], w_ref: Any, *, tile: tuple[int, int], quant_type: str, dtype: Any
) -> None:
    blocks = w_ref.shape[0]
    rows, columns = tile
    first = pl.program_id(0) * rows
    where = pl.ds(first, rows)
    index = first + jnp.arange(rows, dtype=jnp.int32)

    scales = load_scales(named, (where,), index, rows_inside((rows,), first, blocks))
    wide = [
        [jnp.broadcast_to(word[:, None], tile) for word in table]
        for table in tables(scales, quant_type, dtype)
    ]
    codes = load(named["words"].at[where, pl.ds(0, columns)], rows_inside(tile, first, blocks))
    weights = decode_words(codes, wide, dtype).reshape(rows, columns, 8)
    triton().store(
        w_ref.at[where, pl.ds(0, columns), pl.ds(0, 8)],
        weights,
        mask=rows_inside(weights.shape, first, blocks),
    )
