"""The kernel of `dequantize_4bit`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.pallas.tpu import tiles
from q4jax.pallas.tpu.decode import GROUP, planes_float32, scales_of
from q4jax.pallas.tpu.launch import Interpret, launch
from q4jax.pallas.tpu.operands import ScaleRows, stack_of
from q4jax.pallas.tpu.registers import LANES, SUBLANES


def dequantize(arrays: WeightArrays, *, spec: QuantSpec, dtype: Any, interpret: Interpret) -> Array:
    """Decode the weight to `dtype`, in its full shape."""
    if arrays.offset is not None and arrays.offset.ndim:
        one = functools.partial(dequantize, spec=spec, dtype=dtype, interpret=interpret)
        return jax.vmap(one)(arrays)
    lead = arrays.packed.shape[: arrays.packed.ndim - len(spec.packed_shape)]
    stack = stack_of(arrays, spec, None, interpret=interpret)
    n, k = stack.shape
    own_k = tiles.choose_unpacked(k)
    rows = ScaleRows(spec.blocksize, own_k, stack.scales.shape[1])
    # The vector unit has no float16: its conversion is left to XLA.
    in_kernel = jnp.float32 if dtype == jnp.float16 else dtype
    w = launch(
        "dequantize",
        functools.partial(_kernel, spec=spec, rows=rows),
        (stack.layer,),
        [
            (stack.packed, (None, own_k // 2, LANES), lambda i, j, layer: (layer[0], j, i)),
            (
                stack.scales,
                (None, rows.height, LANES),
                lambda i, j, layer: (layer[1], j if rows.per_tile else 0, i),
            ),
        ],
        jax.ShapeDtypeStruct((n, k), in_kernel),
        ((LANES, own_k), lambda i, j, _: (i, j)),
        (pl.cdiv(n, LANES), pl.cdiv(k, own_k)),
        interpret=interpret,
        scratch=[pltpu.VMEM((own_k, LANES), jnp.float32)],
    )
    size = arrays.packed.size // arrays.packed.shape[-1], spec.shape[-1]
    return w[: size[0], : size[1]].astype(dtype).reshape(*lead, *spec.shape)


def _kernel(
    _: Any,
    packed_ref: Any,
    scales_ref: Any,
    w_ref: Any,
    columns_ref: Any,
    *,
    spec: QuantSpec,
    rows: ScaleRows,
    interpret: bool,
) -> None:
    scale = rows.reader(scales_ref, slice(None), pl.program_id(1))
    words = pltpu.bitcast(packed_ref[...], jnp.int32)
    for first in range(0, rows.tile, GROUP):
        own = words[first // 8 : first // 8 + SUBLANES]
        scales = scales_of(scale, first, spec.blocksize, own.shape)
        planes = planes_float32(own, scales, quant_type=spec.quant_type, interpret=interpret)
        for nibble, plane in enumerate(planes):
            columns_ref[pl.ds(first + nibble, SUBLANES, stride=8), :] = plane
    w_ref[...] = columns_ref[...].T.astype(w_ref.dtype)
