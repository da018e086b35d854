"""Who attends to whom: a mask for short texts, and what blocks of it follow from for long ones."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.models.decoder.mixer_spec import View

ATTENTION = (None, "whole", "blocks")
# Above this number of pairs of a query and a key in a row, scores are computed in blocks.
_LONG = 2**20
# Pairs of all rows in a block, and the fewest queries and keys.
_PAIRS, _SMALLEST = 2**18, 128


class Pairs(NamedTuple):
    """Arrays of T queries and S keys from which each pair's place in the mask follows.

    Attributes:
      orders: int32 `[S]` and `[T]`, or `[B, S]` and `[B, T]`; a query sees no key of a higher one.
      ranks: int32 `[B, S]` and `[B, T]`, the number of tokens before each.
      there: bool `[B, S]`, which keys are tokens; None: all.
      segments: int `[B, S]` and `[B, T]`, the document of each; None: a row is one document.
    """

    orders: tuple[Array, Array]
    ranks: tuple[Array, Array]
    there: Array | None
    segments: tuple[Array, Array] | None

    def mask(self, view: View) -> Array:
        """Return which keys each query sees, bool `[B or 1, 1, T, S]`."""
        first, last = self.orders
        if first.ndim == 1:
            mask = (first[None] <= last[:, None])[None, None]
        else:
            mask = _keys(first) <= _queries(last)
        if self.there is not None:
            mask &= _keys(self.there)
        if self.segments is not None:
            mask &= _queries(self.segments[1]) == _keys(self.segments[0])
        keys, queries = _keys(self.ranks[0]), _queries(self.ranks[1])
        # A window counts tokens, whatever lies between them.
        if view.window is not None:
            mask = mask & (keys > queries - view.window)
        if view.chunk is not None:
            mask = mask & (keys // view.chunk == queries // view.chunk)
        return mask

    def block(self, query: Array, key: Array, sizes: tuple[int, int]) -> "Pairs":
        """Return the pairs of a block of queries and one of keys, by their numbers."""

        def keys(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, key * sizes[1], sizes[1], axis=-1)

        def queries(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, query * sizes[0], sizes[0], axis=-1)

        def both(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            return keys(pair[0]), queries(pair[1])

        there = None if self.there is None else keys(self.there)
        segments = None if self.segments is None else both(self.segments)
        return Pairs(both(self.orders), both(self.ranks), there, segments)

    def padded(self, sizes: tuple[int, int]) -> "Pairs":
        """Return as many queries and keys as fill blocks; no token sees those that are added."""
        tokens, slots = (self.ranks[1].shape[1], self.ranks[0].shape[1])
        more = (-slots % sizes[1], -tokens % sizes[0])
        if more == (0, 0):
            return self

        def fill(pair: tuple[Array, Array], values: tuple[int, int]) -> tuple[Array, Array]:
            keys, queries = (
                jnp.pad(array, _at_end(array, extra), constant_values=value)
                for array, extra, value in zip(pair, more, values, strict=True)
            )
            return keys, queries

        there = self.there
        if there is not None:
            there = jnp.pad(there, _at_end(there, more[0]))
        segments = None if self.segments is None else fill(self.segments, (0, 0))
        orders = fill(self.orders, (np.iinfo(np.int32).max, -1))
        return Pairs(orders, fill(self.ranks, (0, 0)), there, segments)


class Blocks(NamedTuple):
    """How scores are computed in blocks.

    Attributes:
      pairs: queries and keys, as many as fill blocks.
      needed: bool, by number of a block of queries and of keys: whether there are pairs to compute.
    """

    pairs: Pairs
    needed: Array

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        keys, queries = self.pairs.ranks
        return queries.shape[1] // self.needed.shape[0], keys.shape[1] // self.needed.shape[1]

    @classmethod
    def of(cls, pairs: Pairs, view: View) -> "Blocks":
        """Choose the sizes of blocks, and find those with pairs."""
        keys, queries = pairs.ranks
        size = 2 * _SMALLEST
        while 4 * size * size * queries.shape[0] <= _PAIRS:
            size *= 2
        sizes = min(size, -(-queries.shape[1] // 8) * 8), min(size, -(-keys.shape[1] // 8) * 8)
        pairs = pairs.padded(sizes)
        counts = tuple(
            array.shape[1] // n for array, n in zip(reversed(pairs.ranks), sizes, strict=True)
        )

        def is_needed(number: Array) -> Array:
            block = pairs.block(number // counts[1], number % counts[1], sizes)
            return jnp.any(block.mask(view))

        needed = lax.map(is_needed, jnp.arange(counts[0] * counts[1], dtype=jnp.int32))
        return cls(pairs, needed.reshape(counts))


@dataclasses.dataclass(frozen=True)
class Reach:
    """The S keys that T queries attend to.

    Attributes:
      mask: bool `[B or 1, 1, T, S]`; None: plain causal attention, or blocks.
      ranks: int32 `[B, S]`, the number of tokens before each key, and `[B, T]` before each query.
      view: what a layer sees.
      blocks: the blocks of the scores; None: they are computed whole.
    """

    mask: Array | None
    ranks: tuple[Array, Array]
    view: View
    blocks: Blocks | None = None

    @classmethod
    def of(cls, pairs: Pairs, view: View, attention: str | None) -> "Reach":
        """Return the reach of layers with a view, computed as `Llama` is told by `attention`."""
        keys, queries = pairs.ranks
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {ATTENTION}, got {attention!r}")
        if attention == "blocks" or (
            attention is None and keys.shape[1] * queries.shape[1] > _LONG
        ):
            return cls(None, pairs.ranks, view, Blocks.of(pairs, view))
        plain = pairs.there is None and pairs.segments is None and view == View()
        return cls(None if plain else pairs.mask(view), pairs.ranks, view)


def _at_end(array: Array, count: int) -> list[tuple[int, int]]:
    return [(0, 0)] * (array.ndim - 1) + [(0, count)]


def _keys(array: Any) -> Any:
    return array[:, None, None, :]


def _queries(array: Any) -> Any:
    return array[:, None, :, None]
