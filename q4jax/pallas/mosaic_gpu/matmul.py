"""The kernel of `x @ W.T` for Hopper: `wgmma` takes the decoded weight from registers."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.pallas.mosaic_gpu import fragments
from q4jax.pallas.mosaic_gpu.fragments import PART, QUAD, ROWS
from q4jax.pallas.mosaic_gpu.launch import Operand, launch, share

_SWIZZLED = (plgpu.TilingTransform((8, PART)), plgpu.SwizzleTransform(2 * PART))


def choose(m: int, spec: QuantSpec) -> tuple[int, int, int]:
    """Choose the rows of x and the columns of W of a step, and the warp groups of a program.

    With 256 columns a thread computes one table for 64 weights. With more than 64 rows of x the
    tensor core takes longer than the decoding, and shared memory has room for 128 columns only. Its
    copies of x would be slower still if each served 64 rows of W: there two warp groups share one.
    """
    if m > 64:
        return 128, 128, 2 if spec.shape[0] > ROWS else 1
    wide = spec.blocksize >= 64 and spec.shape[1] % 256 == 0
    return -(-m // 8) * 8, 256 if wide else 128, 1


def linear(
    x: Array, arrays: WeightArrays | ArraysInStack, bias: Array | None, *, spec: QuantSpec
) -> Array:
    """[M, K] -> [M, N] in x's dtype, bfloat16 or float16.

    Scales are decoded before the call, one for each quarter of a row of a tile.
    """
    m, (n, k) = x.shape[0], spec.shape
    rows, columns, groups = choose(m, spec)
    height = groups * ROWS
    tiles = -(-n // height), -(-m // rows)
    steps, splits = share(tiles[0] * tiles[1], k // columns, groups)
    words, scales, first = fragments.operands(arrays, spec, columns // QUAD)
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
                (height, columns // 8),
                fragments.word_transforms(columns),
                lambda step, row, _: (row * height, step * (columns // 8)),
                first,
            ),
            Operand(scales, (height, QUAD), (), lambda step, row, _: (row * height, step * QUAD)),
            Operand(
                fragments.permute(x, columns),
                (rows, columns),
                _SWIZZLED,
                lambda step, _, column: (column * rows, step * columns),
            ),
        ],
        multiply,
        tile=(height, rows),
        tiles=tiles,
        steps=steps,
        splits=splits,
        groups=groups,
    )[:n, :m].T
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(x.dtype)
