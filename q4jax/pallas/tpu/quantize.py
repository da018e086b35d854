"""The kernel of `quantize_4bit`: one pass over the weight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from q4jax.core import codebooks
from q4jax.core.arithmetic import flush
from q4jax.core.blockwise import LARGEST_RECIPROCAL
from q4jax.core.spec import QuantSpec
from q4jax.pallas.tpu import tiles
from q4jax.pallas.tpu.decode import GROUP, scales_of, shift_of
from q4jax.pallas.tpu.division import divide
from q4jax.pallas.tpu.launch import Interpret, launch
from q4jax.pallas.tpu.operands import ScaleRows
from q4jax.pallas.tpu.registers import LANES, SUBLANES, look_up


def quantize(w: Array, *, spec: QuantSpec, interpret: Interpret) -> tuple[Array, Array]:
    """Return the codes `[N, K / 2]` and the plain scales `[N, K / blocksize]`.

    Leading axes of `w` count for rows. The results are views of arrays that lie with N minor, as
    the other kernels read them.
    """
    if w.dtype == jnp.float16:  # which the vector unit lacks
        w = w.astype(jnp.float32)
    w = w.reshape(-1, w.shape[-1])
    n, k = w.shape
    short_n, short_k = max(0, LANES - n), max(0, LANES - k)
    if short_n or short_k:
        w = jnp.pad(w, ((0, short_n), (0, short_k)))
    own_k = tiles.choose_unpacked(w.shape[1], spec.blocksize)
    blocks = w.shape[1] // spec.blocksize
    rows = ScaleRows(spec.blocksize, own_k, blocks)
    packed, absmax = launch(
        "quantize",
        functools.partial(_kernel, spec=spec, rows=rows),
        (),
        [(w, (LANES, own_k), lambda i, j: (i, j))],
        [
            jax.ShapeDtypeStruct((w.shape[1] // 2, w.shape[0]), jnp.uint8),
            jax.ShapeDtypeStruct((blocks, w.shape[0]), jnp.float32),
        ],
        [
            ((own_k // 2, LANES), lambda i, j: (j, i)),
            ((rows.height, LANES), lambda i, j: (j if rows.per_tile else 0, i)),
        ],
        (pl.cdiv(w.shape[0], LANES), pl.cdiv(w.shape[1], own_k)),
        interpret=interpret,
        scratch=[
            pltpu.VMEM((own_k, LANES), jnp.float32),
            *[pltpu.VMEM((own_k // spec.blocksize, LANES), jnp.float32)] * 2,
        ],
        sums=1,
    )
    return packed[: k // 2, :n].T, absmax[: k // spec.blocksize, :n].T


def _kernel(
    w_ref: Any,
    packed_ref: Any,
    absmax_ref: Any,
    columns_ref: Any,
    own_absmax_ref: Any,
    reciprocal_ref: Any,
    *,
    spec: QuantSpec,
    rows: ScaleRows,
    interpret: bool,
) -> None:
    columns_ref[...] = w_ref[...].astype(jnp.float32).T
    _find_absmax(columns_ref, own_absmax_ref, spec.blocksize, interpret)
    own = own_absmax_ref[...]
    column = flush(own)
    one = divide(jnp.ones_like(column), column)
    reciprocal_ref[...] = jnp.where(column == 0, 0.0, one)
    huge = jnp.sum(jnp.where(column > LARGEST_RECIPROCAL, 1.0, 0.0)) > 0.0
    write = functools.partial(
        _write_codes, packed_ref, columns_ref, own_absmax_ref, reciprocal_ref, spec
    )
    pl.when(jnp.logical_not(huge))(functools.partial(write, by_division=False))
    pl.when(huge)(functools.partial(write, by_division=True))
    _write_absmax(absmax_ref, own, rows, pl.program_id(1))


def _plane(columns_ref: Any, first: Any, nibble: int) -> Array:
    """The weights 8i + `nibble` of the 64 from row `first` on, `[8, N]`."""
    return columns_ref[pl.ds(first + nibble, SUBLANES, stride=8), :]


def _find_absmax(columns_ref: Any, absmax_ref: Any, blocksize: int, interpret: bool) -> None:
    """Write the largest magnitude of each block of a column; NaN where there is a NaN."""
    tile, width = columns_ref.shape
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    for block in range(0, tile, max(blocksize, GROUP)):
        # Without their sign bit, floats order as integers do, NaN last.
        planes = (
            lax.bitcast_convert_type(_plane(columns_ref, first, nibble), jnp.int32) & 0x7FFFFFFF
            for first in range(block, block + max(blocksize, GROUP), GROUP)
            for nibble in range(8)
        )
        most = functools.reduce(jnp.maximum, planes)
        for distance in (1, 2, 4)[: 2 if blocksize < GROUP else 3]:
            other = look_up(most, sublane ^ distance, 0, interpret=interpret)
            most = jnp.maximum(most, other)
        found = lax.bitcast_convert_type(most, jnp.float32)
        for half in range(max(1, GROUP // blocksize)):
            absmax_ref[pl.ds(block // blocksize + half, 1), :] = found[4 * half : 4 * half + 1]


def _write_codes(
    packed_ref: Any,
    columns_ref: Any,
    absmax_ref: Any,
    reciprocal_ref: Any,
    spec: QuantSpec,
    *,
    by_division: bool,
) -> None:
    """Write the bytes of a tile.

    Blocks are multiplied by the reciprocal of their absmax, but with `by_division` those whose
    reciprocal is subnormal are divided.
    """
    tile, width = columns_ref.shape
    shape = (SUBLANES, width)

    def write(group: Array, _: None) -> None:
        first = pl.multiple_of(group * GROUP, GROUP)

        def of(ref: Any) -> Array:
            return scales_of(
                lambda row: ref[pl.ds(lax.div(row, spec.blocksize), 1), :],
                first,
                spec.blocksize,
                shape,
            )

        absmax, reciprocal = flush(of(absmax_ref)), of(reciprocal_ref)
        words = jnp.zeros(shape, jnp.int32)
        for nibble in range(8):
            w = flush(_plane(columns_ref, first, nibble))
            scaled = flush(w * reciprocal)
            if by_division:
                scaled = jnp.where(absmax > LARGEST_RECIPROCAL, divide(w, absmax), scaled)
            words |= _codes(scaled, spec.quant_type) << shift_of(nibble)
        at = pl.ds(pl.multiple_of(group * (GROUP // 2), GROUP // 2), GROUP // 2)
        packed_ref[at, :] = pltpu.bitcast(words, jnp.uint8)

    lax.fori_loop(0, tile // GROUP, write, None)


def _codes(scaled: Array, quant_type: str) -> Array:
    """The codes of values in [-1, 1], int32; the last in ascending order for NaN."""
    codebook = codebooks.CODEBOOKS[quant_type]
    first, *others = (int(code) for code in codebook.sorted_codes)
    codes = jnp.full(scaled.shape, first, jnp.int32)
    for threshold, code in zip(codebook.thresholds, others, strict=True):
        codes = jnp.where(scaled <= np.float32(threshold), codes, np.int32(code))
    return codes


def _write_absmax(absmax_ref: Any, own: Array, rows: ScaleRows, tile: Array) -> None:
    """Write the scales of a tile, which are all of their block or some of its rows."""
    if rows.per_tile:
        absmax_ref[...] = own
        return
    for row in range(own.shape[0]):
        at = tile * own.shape[0] + row

        def write(at: Array = at, row: int = row) -> None:
            absmax_ref[pl.ds(at, 1), :] = own[row : row + 1]

        pl.when(at < rows.blocks)(write)
