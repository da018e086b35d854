"""Quantization for TPUs, a tile of rows at a time."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import blockwise, codebooks
from q4jax.core.arithmetic import TPU
from q4jax.core.spec import QuantSpec
from q4jax.xla.tpu import lanes
from q4jax.xla.tpu.chunks import over_rows
from q4jax.xla.tpu.scales import look_up

_TILE_ELEMENTS = 2**20


def ravel(w: Array) -> Array:
    """Return `w.ravel()`, a tile of rows at a time.

    Where the last axis is no multiple of a register's lanes, libtpu takes time to compile a ravel
    in proportion to the array's size: 17 seconds for 4096 x 4104.
    """
    if w.size > np.iinfo(np.int32).max:  # the loop would not count as far
        return w.ravel()
    rows = w.reshape(-1, w.shape[-1])
    columns = rows.shape[1]

    def tile(flat: Array, first: int | Array, part: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(flat, part.ravel(), first * columns, 0)

    flat = jnp.zeros(w.size, w.dtype)
    return over_rows(tile, flat, rows, columns=columns, elements=_TILE_ELEMENTS)


def quantize_rows(w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
    """Return the codes `[N, K/2]` and plain scales `[N, K/blocksize]` of a matrix `[N, K]`.

    The rows of a tile are transposed, so that a block lies along sublanes.
    """
    n, k = w.shape

    def tile(found: tuple[Array, Array], first: int | Array, rows: Array) -> tuple[Array, Array]:
        blocks = rows.astype(jnp.float32).T.reshape(k // spec.blocksize, spec.blocksize, len(rows))
        absmax = blockwise.block_absmax(blocks, 1)
        codes = _encode(_scale(blocks, absmax[:, None]), spec.quant_type)
        packed = lanes.pack(codes.reshape(k, len(rows)))
        return (
            lax.dynamic_update_slice_in_dim(found[0], packed, first, 0),
            lax.dynamic_update_slice_in_dim(found[1], absmax.T, first, 0),
        )

    scales = jnp.zeros((n, k // spec.blocksize), jnp.float32)
    zeros = jnp.zeros((n, k // 2), jnp.uint8), scales
    return over_rows(tile, zeros, w, columns=k, elements=_TILE_ELEMENTS)


def _scale(blocks: Array, absmax: Array) -> Array:
    """`blocks / absmax`, as `blockwise` does it for complete blocks."""
    blocks, absmax = TPU.flush(blocks), TPU.flush(absmax)
    scaled = TPU.flush(blocks * jnp.where(absmax == 0, 0, TPU.reciprocal(absmax)))
    large = absmax > blockwise.LARGEST_RECIPROCAL
    # Long division takes longer than all the rest, and hardly a weight needs it.
    return lax.cond(
        large.any(),
        lambda: jnp.where(large, TPU.divide(blocks, absmax), scaled),
        lambda: scaled,
    )


def _encode(scaled: Array, quant_type: str) -> Array:
    """The code of each number in [-1, 1]; a NaN is above every threshold."""
    book = codebooks.CODEBOOKS[quant_type]
    interval = sum((~(scaled <= threshold)).astype(jnp.int32) for threshold in book.thresholds)
    return look_up(book.sorted_codes.astype(np.int32), interval, 0)


def double_quantize(absmax: Array) -> tuple[Array, Array, Array]:
    """`blockwise.double_quantize`."""
    return blockwise.double_quantize_by(TPU, absmax, "compare_all")
