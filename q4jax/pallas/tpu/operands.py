"""A weight's arrays as the kernels take them, and the parts of them that a step reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.pallas.tpu.launch import Interpret
from q4jax.pallas.tpu.registers import LANES, SUBLANES
from q4jax.pallas.tpu.scales import decode_scales
from q4jax.pallas.tpu.tiles import Tile


@dataclasses.dataclass(frozen=True)
class Stack:
    """Weights on an axis of their own, output features minor.

    Attributes:
      packed: uint8 `[L, K / 2, N]`.
      scales: float32 `[L or 1, K / blocksize, N]`.
      layer: int32 `[2]`: which of `packed`, and which of `scales`.
    """

    packed: Array
    scales: Array
    layer: Array

    @property
    def shape(self) -> tuple[int, int]:
        """N and K of each weight, padded to whole registers."""
        return self.packed.shape[2], 2 * self.packed.shape[1]


def stack_of(
    arrays: WeightArrays, spec: QuantSpec, layer: Array | None, *, interpret: Interpret
) -> Stack:
    """View a weight's arrays, or with `layer` those of a stack, as a `Stack`.

    The transposes are views where the arrays lie with N minor (`q4jax.pallas.tpu.placement`), and
    copies elsewhere. Nested scales are decoded, for one weight. Only a weight with fewer than 128
    rows or columns is padded.
    """
    stacked = layer is not None
    if layer is None:
        layer = jnp.zeros((), jnp.int32)
    packed = _minor_rows(arrays.packed, stacked)
    own_scales = arrays.absmax.ndim < arrays.packed.ndim  # of the one weight that is meant
    scales = _minor_rows(arrays.absmax, stacked and not own_scales)
    both = jnp.stack([layer, jnp.zeros_like(layer) if own_scales else layer]).astype(jnp.int32)
    if arrays.nested_absmax is not None and arrays.offset is not None:
        nested, offset = arrays.nested_absmax, arrays.offset
        if stacked:
            nested, offset = nested[layer], offset[layer]
        scales = decode_scales(both[1:], scales, nested, offset, interpret=interpret)
        both = both * jnp.asarray([1, 0], jnp.int32)
    short_k = max(0, LANES // 2 - packed.shape[1])
    short_n = max(0, LANES - packed.shape[2])
    if short_k or short_n:
        packed = jnp.pad(packed, ((0, 0), (0, short_k), (0, short_n)))
        blocks = -(-2 * short_k // spec.blocksize)
        scales = jnp.pad(scales, ((0, 0), (0, blocks), (0, short_n)))
    return Stack(packed, scales, both)


def _minor_rows(array: Array, stacked: bool) -> Array:
    """[*lead, N, C] -> [L, C, N]; without a stack, leading axes are rows too, and L is 1."""
    lead = array.shape[:1] if stacked else (1,)
    return jnp.swapaxes(array.reshape(*lead, -1, array.shape[-1]), 1, 2)


def weight_operands(
    stack: Stack, rows: "ScaleRows", tile: Tile, at: Callable[[Any, Any], tuple[Any, Any]]
) -> list[tuple[Any, Any, Any]]:
    """Return the operands of `launch` for a weight's tiles: its codes and its scales.

    `at` gives the numbers of a tile along K and N, from the grid's second and third indices.
    """

    def codes(_: Any, j: Any, s: Any, layer: Any) -> tuple[Any, ...]:
        return (layer[0], *at(j, s))

    def scales(_: Any, j: Any, s: Any, layer: Any) -> tuple[Any, ...]:
        k, n = at(j, s)
        return layer[1], k if rows.per_tile else 0, n

    return [
        (stack.packed, (None, tile.k // 2, tile.n), codes),
        (stack.scales, (None, rows.height, tile.n), scales),
    ]


def columns(x: Array, width: int) -> Array:
    """Pad the columns of an activation to `width`, where the weight was."""
    return x if x.shape[1] >= width else jnp.pad(x, ((0, 0), (0, width - x.shape[1])))


@dataclasses.dataclass(frozen=True)
class ScaleRows:
    """How the scales of a tile of `tile` columns of K are read.

    A block of an array has whole registers or a whole axis: the scales of a tile where they fill
    registers, else those of all K.

    Attributes:
      blocksize: weights of a scale.
      tile: columns of K of a tile.
      blocks: scales of a row of the weight.
    """

    blocksize: int
    tile: int
    blocks: int

    @property
    def per_tile(self) -> bool:
        """Whether a step reads the scales of its own tile only."""
        return self.tile // self.blocksize % SUBLANES == 0 and self.tile >= self.blocksize

    @property
    def height(self) -> int:
        """The rows of scales that a step reads."""
        return self.tile // self.blocksize if self.per_tile else self.blocks

    def reader(
        self,
        ref: Any,
        where: Any,
        tile: Any,
        *,
        limit: int | None = None,
        inside: Array | None = None,
    ) -> Callable[[int], Array]:
        """Return `scale` of `decode_tile` for columns `where` of the block `ref` of scales.

        Args:
          ref: the block.
          where: its columns.
          tile: the tile's number.
          limit: scales from this row on are zero; None: the tile is inside the weight, or what it
            has outside is not used.
          inside: bool `[1, columns]`, where scales are not zero; None: everywhere.
        """

        def scale(row: int) -> Array:
            block = lax.div(tile * self.tile, self.blocksize) + row // self.blocksize
            at = row // self.blocksize if self.per_tile else jnp.minimum(block, self.blocks - 1)
            scales = ref[pl.ds(at, 1), where]
            if limit is not None:
                scales = jnp.where(block < limit, scales, 0.0)
            return scales if inside is None else jnp.where(inside, scales, 0.0)

        return scale
