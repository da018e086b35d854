"""Key/value cache of past tokens, with a fixed capacity."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from q4jax.models.llama.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Past keys and values of every layer, as an immutable pytree.

    Attributes:
      keys: `[layers, B, capacity, kv_heads, head_dim]`; slots from `length` on are unset.
      values: of the same shape as `keys`.
      mask: bool `[B, capacity]`, True in slots of real tokens, False in padding and unset slots.
      length: int32 scalar, the number of filled slots.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike) -> "KVCache":
        """Return a cache without tokens; `dtype` is the compute dtype of the model."""
        heads = (config.num_key_value_heads, config.head_dim)
        shape = (config.num_hidden_layers, batch, capacity, *heads)
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            mask=jnp.zeros((batch, capacity), bool),
            length=jnp.zeros((), jnp.int32),
        )

    def open(self, token_mask: jax.Array) -> "KVCache":
        """Store the mask, bool `[B, T]`, of tokens that `write` will add.

        Raises:
          ValueError: the cache has too few free slots, or too few slots if `length` is traced.
        """
        tokens, capacity = token_mask.shape[1], self.mask.shape[1]
        filled = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if filled + tokens > capacity:
            raise ValueError(
                f"{tokens} tokens do not fit into a cache of {capacity} slots, {filled} of them "
                "filled"
            )
        mask = jax.lax.dynamic_update_slice(self.mask, token_mask, (0, self.length))
        return dataclasses.replace(self, mask=mask)

    def write(self, layer: jax.Array, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Write `[B, T, kv_heads, head_dim]` after the filled slots of one layer."""
        start = (layer, 0, self.length, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys[None], start),
            values=jax.lax.dynamic_update_slice(self.values, values[None], start),
        )

    def close(self, tokens: int) -> "KVCache":
        """Mark `tokens` more slots as filled, after every layer has written them."""
        return dataclasses.replace(self, length=self.length + tokens)
