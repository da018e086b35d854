"""The kernel of `dequantize_4bit`: codes to weights, in their order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from q4jax.blockwise import Arrays
from q4jax.pallas.backend import triton
from q4jax.pallas.weight import decode_words, load, load_scales, nested_operands, tables
from q4jax.spec import QuantSpec

_TILE_WORDS = 512


def dequantize(arrays: Arrays, *, spec: QuantSpec, dtype: Any, interpret: bool) -> Array:
    """The weight as `dtype`, in its full shape.

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
    kernel = functools.partial(
        _kernel, names=tuple(named), tile=tile, quant_type=spec.quant_type, dtype=dtype
    )
    w = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((blocks, words, 8), dtype),
        grid=(pl.cdiv(blocks, tile[0]),),
        compiler_params=triton().CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="q4jax_dequantize",
    )(*named.values())
    lead = arrays.packed.shape[: arrays.packed.ndim - len(spec.packed_shape)]
    return w.reshape(*lead, *spec.shape)


def _kernel(
    *refs: Any, names: tuple[str, ...], tile: tuple[int, int], quant_type: str, dtype: Any
) -> None:
    *inputs, w_ref = refs
    named = dict(zip(names, inputs, strict=True))
    blocks = w_ref.shape[0]
    rows, columns = tile
    first = pl.program_id(0) * rows
    where = pl.ds(first, rows)
    index = first + jnp.arange(rows)

    def inside(*shape: int) -> Array | None:
        if blocks % rows == 0:
            return None
        return first + lax.broadcasted_iota(jnp.int32, shape, 0) < blocks

    scales = load_scales(named, (where,), index, inside(rows))
    wide = [
        [jnp.broadcast_to(word[:, None], tile) for word in table]
        for table in tables(scales, quant_type, dtype)
    ]
    codes = load(named["words"].at[where, pl.ds(0, columns)], inside(*tile))
    weights = decode_words(codes, wide, dtype).reshape(rows, columns, 8)
    triton().store(
        w_ref.at[where, pl.ds(0, columns), pl.ds(0, 8)], weights, mask=inside(*weights.shape)
    )
