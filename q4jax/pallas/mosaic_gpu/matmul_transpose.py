"""The kernel of `g @ W` for Hopper: `wgmma` takes the transposed weight from registers."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.pallas.mosaic_gpu import fragments
from q4jax.pallas.mosaic_gpu.fragments import DEPTH
from q4jax.pallas.mosaic_gpu.launch import Operand, launch, share

_ROWS = 64  # of W a step
_SWIZZLED = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(2 * DEPTH))


def choose(m: int) -> tuple[int, int]:
    """Choose the rows of g and the columns of W of a tile.

    A thread computes a table for a sixteenth of the columns, which is why there should be many; but
    the sums of all are in registers. With 1,024 columns products would wait for registers.
    """
    return min(64, -(-m // 8) * 8), 512 if m <= 16 else 256


def linear_transpose(g: Array, arrays: WeightArrays | ArraysInStack, *, spec: QuantSpec) -> Array:
    """[M, N] -> [M, K] in g's dtype, bfloat16 or float16.

    Scales are decoded before the call, one for 64 weights or fewer.
    """
    m, (n, k) = g.shape[0], spec.shape
    rows, columns = choose(m)
    block = min(64, spec.blocksize)
    tiles = -(-k // columns), -(-m // rows)
    steps, splits = share(tiles[0] * tiles[1], -(-n // _ROWS))
    words, scales, start = fragments.operands(arrays, spec, block)
    g = jnp.pad(g, ((0, -m % rows), (0, -n % _ROWS)))

    def multiply(total: Any, words: Any, scales: Any, g_tile: Any) -> None:
        for first in range(0, _ROWS, DEPTH):
            weights = fragments.decode_transposed(
                words,
                scales,
                first,
                columns=columns,
                block=block,
                quant_type=spec.quant_type,
                dtype=g.dtype,
            )
            plgpu.wgmma(total, weights, g_tile.at[:, pl.ds(first, DEPTH)].T)

    def of_weight(
        array: Array, weights: int, transforms: tuple[Any, ...], start: Array | None = None
    ) -> Operand:
        """An operand that has an element for so many weights of a row."""
        width = columns // weights
        return Operand(
            array,
            (_ROWS, width),
            transforms,
            lambda step, row, _: (step * _ROWS, row * width),
            start,
        )

    total = launch(
        "linear_transpose",
        [
            of_weight(words, 8, fragments.TRANSPOSED_WORDS, start),
            of_weight(scales, block, ()),
            Operand(
                g, (rows, _ROWS), _SWIZZLED, lambda step, _, column: (column * rows, step * _ROWS)
            ),
        ],
        multiply,
        tile=(columns, rows),
        tiles=tiles,
        steps=steps,
        splits=splits,
    )
    return fragments.restore(total, columns)[:k, :m].T.astype(g.dtype)
