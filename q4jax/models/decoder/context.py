"""What all layers of one call share: positions, rotations, and who attends to whom."""

import dataclasses

import jax
import jax.numpy as jnp

from q4jax.models.decoder.kv_cache import KVCache, ring_size, ring_slots
from q4jax.models.decoder.mixer_spec import Attention, LatentAttention, Rope, View
from q4jax.models.decoder.reach import Pairs, Reach
from q4jax.models.decoder.rope import Rotation, rotation
from q4jax.models.decoder.sequences import Sequences
from q4jax.models.decoder.stacks import Stack


@dataclasses.dataclass(frozen=True)
class Context:
    """The properties of T tokens that layers read.

    Attributes:
      sequences: where the tokens stand.
      real: bool `[B, T]`, False at padding.
      ranks: int32 `[B, T]`, the number of earlier tokens of the same document.
      start: slot of the first token in the cache; 0 without one.
      cached: whether there is a cache.
      rotations: cosine and sine by kind of rotary embedding.
      reaches: keys by the tokens that a layer sees, and the size of its ring.
      slots: size of a ring -> the slots `[B, T]` of the new tokens.
    """

    sequences: Sequences
    real: jax.Array
    ranks: jax.Array
    start: jax.Array | int
    cached: bool
    rotations: dict[Rope, Rotation]
    reaches: dict[tuple[View, int | None], Reach]
    slots: dict[int, jax.Array]
    capacity: int

    @classmethod
    def from_sequences(
        cls,
        stacks: tuple[Stack, ...],
        sequences: Sequences,
        cache: KVCache | None,
        attention: str | None = None,
    ) -> "Context":
        """Compute what the layers of these stacks need, once for each kind.

        Args:
          stacks: the stacks.
          sequences: where the tokens stand.
          cache: the opened cache, or None.
          attention: as in `Llama`.
        """
        tokens, start = sequences.positions.shape[1], sequences.start
        own = _last(sequences.ranks, start, tokens)
        real = sequences.real
        real = jnp.ones(own.shape, bool) if real is None else _last(real, start, tokens)
        capacity = sequences.ranks.shape[1]
        rotations: dict[Rope, Rotation] = {}
        reaches: dict[tuple[View, int | None], Reach] = {}
        for stack in stacks:
            mixer = stack.layer.mixer
            if not isinstance(mixer, Attention | LatentAttention):
                continue
            if mixer.rope is not None and mixer.rope not in rotations:
                rotations[mixer.rope] = rotation(
                    sequences.positions, mixer.rope, sequences.segments
                )
            size = None if cache is None else ring_size(mixer, capacity)
            if (mixer.view, size) not in reaches:
                pairs = (
                    _pairs(sequences, own)
                    if cache is None or size is None
                    else _ring_pairs(cache.rings[size], own, real)
                )
                reaches[mixer.view, size] = Reach.of(pairs, mixer.view, attention)
        slots = {} if cache is None else {s: ring_slots(own, real, s) for s in cache.rings}
        return cls(
            sequences, real, own, start, cache is not None, rotations, reaches, slots, capacity
        )

    def reach(self, mixer: Attention | LatentAttention) -> Reach:
        """Return the keys of a layer."""
        return self.reaches[mixer.view, self.ring(mixer)]

    def ring(self, mixer: Attention | LatentAttention) -> int | None:
        """Return the size of a layer's ring; None: it keeps all tokens, or there is no cache."""
        return ring_size(mixer, self.capacity) if self.cached else None

    def nothing_to_attend(self, spec: Attention, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return zeros of the shape of a layer's keys and values, for the tokens `x [B, T, …]`."""
        slots = self.reach(spec).ranks[0].shape[1]
        zeros = jnp.zeros((x.shape[0], slots, spec.kv_heads, spec.head_dim), x.dtype)
        return zeros, zeros


def _last(array: jax.Array, start: jax.Array | int, tokens: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, tokens, axis=1)


def _pairs(sequences: Sequences, own: jax.Array) -> Pairs:
    """Return the pairs of queries and keys that lie in the order of their slots."""
    ranks, segments = sequences.ranks, sequences.segments
    queries = sequences.start + jnp.arange(own.shape[1], dtype=jnp.int32)
    orders = jnp.arange(ranks.shape[1], dtype=jnp.int32), queries
    documents = None if segments is None else (segments, segments)
    return Pairs(orders, (ranks, own), sequences.real, documents)


def _ring_pairs(ring: jax.Array, own: jax.Array, real: jax.Array) -> Pairs:
    """Return the pairs with keys of a ring, whose order is that of their ranks, and new ones."""
    ranks = jnp.concatenate([ring, own], axis=1)
    there = jnp.concatenate([ring >= 0, real], axis=1)
    return Pairs((ranks, own), (ranks, own), there, None)
