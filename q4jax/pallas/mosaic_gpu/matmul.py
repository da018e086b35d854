"""The kernel of `x @ W.T` for Hopper: `wgmma` takes the decoded weight from registers."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.pallas.mosaic_gpu import fragments
from q4jax.pallas.mosaic_gpu.fragments import PART, QUAD, ROWS
from q4jax.pallas.mosaic_gpu.launch import Operand, launch, share

_SWIZZLED = (plgpu.TilingTransform((8, PART)), plgpu.SwizzleTransform(2 * PART))


def choose(m: int, spec: QuantSpec) -> tuple[int, int]:
    """Choose the rows of x and the columns of W of a step.

    With 256 columns a thread computes one table for 64 weights. With more than 64 rows of x the
    tensor core takes longer than the decoding, and shared memory has room for 128 columns only.
    """
    wide = m <= 64 and spec.blocksize >= 64 and spec.shape[1] % 256 == 0
    return 128 if m > 64 else -(-m // 8) * 8, 256 if wide else 128


def linear(x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec) -> Array:
    """[M, K] -> [M, N] in x's dtype, bfloat16 or float16.

    Scales are decoded before the call, one for each quarter of a row of a tile.
    """
    m, (n, k) = x.shape[0], spec.shape
    rows, columns = choose(m, spec)
    tiles = -(-n // ROWS), -(-m // rows)
    steps, splits = share(tiles[0] * tiles[1], k // columns)
    words, scales = fragments.operands(arrays, spec, columns // QUAD)
    x = jnp.pad(x, ((0, -m % rows), (0, 0)))

    def multiply(total: Any, words: Any, scales: Any, x_tile: Any) -> None:
        decoded = fragments.decode(
            words, scales, columns=columns, quant_type=spec.quant_type, dtype=x.dtype
        )
        for part, weights in enumerate(decoded):
            plgpu.wgmma(total, weights, x_tile.at[:, pl.ds(part * PART, PART)].T)

    total = launch(
        "linear",
        [
            Operand(
                words,
                (ROWS, columns // 8),
                fragments.word_transforms(columns),
                lambda step, row, _: (row * ROWS, step * (columns // 8)),
            ),
            Operand(scales, (ROWS, QUAD), (), lambda step, row, _: (row * ROWS, step * QUAD)),
            Operand(
                fragments.permute(x, columns),
                (rows, columns),
                _SWIZZLED,
                lambda step, _, column: (column * rows, step * columns),
            ),
        ],
        multiply,
        tile=(ROWS, rows),
        tiles=tiles,
        steps=steps,
        splits=splits,
    )[:n, :m].T
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(x.dtype)
