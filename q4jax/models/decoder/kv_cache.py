"""What layers keep of past tokens, with a fixed capacity."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from q4jax.models.decoder.mixer_spec import Attention, DeltaNet, LatentAttention, View
from q4jax.models.decoder.stacks import Stack

_FIRST = np.int32(0)  # an index of the type of `length`, also under x64
States = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The state of every layer, as an immutable pytree.

    Attributes:
      states: name of a stack of layers -> its arrays, `[layers, B, ...]`. Layers that attend to all
        tokens keep "keys" and "values", `[layers, B, capacity, kv_heads, head_dim]`, unset from
        `length` on. Those with a window keep as many of the last tokens. Recurrent ones keep
        "state" and "taps".
      rings: size of a window -> int32 `[B, window]`, the rank of the token in each of its slots;
        -1: the slot is unset.
      mask: bool `[B, capacity]`, True in slots of real tokens, False in padding and unset slots.
      length: int32 scalar, the number of filled slots.
    """

    states: dict[str, States]
    rings: dict[int, jax.Array]
    mask: jax.Array
    length: jax.Array

    @classmethod
    def empty(
        cls, stacks: tuple[Stack, ...], batch: int, capacity: int, dtype: DTypeLike
    ) -> "KVCache":
        """Return a cache without tokens; `dtype` is the compute dtype of the model."""
        rings = {size for stack in stacks if (size := ring_size(stack.layer.mixer, capacity))}
        return cls(
            states={s.name: _empty(s, batch, capacity, dtype) for s in stacks},
            rings={size: jnp.full((batch, size), -1, jnp.int32) for size in sorted(rings)},
            mask=jnp.zeros((batch, capacity), bool),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.mask.shape[1]

    def open(self, token_mask: jax.Array) -> "KVCache":
        """Store the mask, bool `[B, T]`, of tokens that layers will add.

        Raises:
          ValueError: the cache has too few free slots, or too few slots if `length` is traced.
        """
        tokens, capacity = token_mask.shape[1], self.capacity
        filled = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if filled + tokens > capacity:
            raise ValueError(
                f"{tokens} tokens do not fit into a cache of {capacity} slots, {filled} of them "
                "filled"
            )
        mask = jax.lax.dynamic_update_slice(self.mask, token_mask, (_FIRST, self.length))
        return dataclasses.replace(self, mask=mask)

    def close(self, states: dict[str, States], ranks: jax.Array, real: jax.Array) -> "KVCache":
        """Return the cache with T more filled slots, after every layer has written them.

        Args:
          states: what the layers have written.
          ranks: int32 `[B, T]`, the number of real tokens before each.
          real: bool `[B, T]`, False at padding.
        """
        rows = jnp.arange(len(ranks), dtype=jnp.int32)[:, None]
        rings = {
            size: ring.at[rows, ring_slots(ranks, real, size)].set(ranks, mode="drop")
            for size, ring in self.rings.items()
        }
        length = self.length + ranks.shape[1]
        return dataclasses.replace(self, states=states, rings=rings, length=length)


def ring_size(mixer: Any, capacity: int) -> int | None:
    """Return the number of tokens that a layer keeps; None: all, or a state of another kind."""
    view = mixer.view if isinstance(mixer, Attention | LatentAttention) else View()
    reach = view.window or view.chunk
    return reach if reach is not None and reach < capacity else None


def ring_slots(ranks: jax.Array, real: jax.Array, size: int) -> jax.Array:
    """Return the slot of each token in a ring; `size`, which is none, for those not to be kept."""
    last = jnp.max(jnp.where(real, ranks, -1), axis=1, keepdims=True)
    return jnp.where(real & (ranks > last - size), ranks % size, size)


def write(state: States, layer: jax.Array, start: jax.Array | int, **new: jax.Array) -> States:
    """Write `[B, T, ...]` after the filled slots of one layer."""
    found = dict(state)
    for name, values in new.items():
        at: Any = (layer, _FIRST, start, *(_FIRST,) * (values.ndim - 2))
        found[name] = jax.lax.dynamic_update_slice(
            state[name], values[None].astype(state[name].dtype), at
        )
    return found


def write_ring(state: States, layer: jax.Array, slots: jax.Array, **new: jax.Array) -> States:
    """Write `[B, T, ...]` to slots `[B, T]` of one layer's ring."""
    rows = jnp.arange(len(slots), dtype=jnp.int32)[:, None]
    return {
        **state,
        **{name: state[name].at[layer, rows, slots].set(v, mode="drop") for name, v in new.items()},
    }


def _empty(stack: Stack, batch: int, capacity: int, dtype: DTypeLike) -> States:
    mixer, lead = stack.layer.mixer, (len(stack.numbers), batch)
    if isinstance(mixer, DeltaNet):
        heads = (mixer.value_heads, mixer.key_dim, mixer.value_dim)
        width = 2 * mixer.key_heads * mixer.key_dim + mixer.value_heads * mixer.value_dim
        return {
            "state": jnp.zeros((*lead, *heads), jnp.float32),
            "taps": jnp.zeros((*lead, mixer.kernel - 1, width), dtype),
        }
    slots = ring_size(mixer, capacity) or capacity
    if isinstance(mixer, LatentAttention):
        dims = (mixer.plain_dim + mixer.rope.dim, mixer.value_dim)
        shapes = [(*lead, slots, mixer.heads, dim) for dim in dims]
    elif mixer.keys_of == "reads":
        return {}
    else:
        shapes = [(*lead, slots, mixer.kv_heads, mixer.head_dim)] * 2
    return {name: jnp.zeros(s, dtype) for name, s in zip(("keys", "values"), shapes, strict=True)}
