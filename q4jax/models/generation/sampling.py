"""How a token is chosen from logits."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["greedy", "draw", "filter"]


class Sampling(NamedTuple):
    """The numbers of a choice: traced, so that no new value of one compiles anything."""

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32

    @classmethod
    def checked(
        cls, temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
    ) -> "tuple[Kind, Sampling]":
        """The kind of the choice, which a program is compiled for, and its numbers.

        Raises:
          ValueError: an argument out of its range.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and not 1 <= top_k <= vocab_size:
            raise ValueError(f"top_k must be from 1 to vocab_size={vocab_size}, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        kind: Kind = "draw" if top_k is None and top_p is None else "filter"
        numbers = cls(
            np.float32(temperature),
            np.int32(vocab_size if top_k is None else top_k),
            np.float32(np.inf if top_p is None else top_p),
        )
        return kind if temperature else "greedy", numbers

    def choose(self, kind: Kind, logits: jax.Array, key: jax.Array) -> jax.Array:
        """int32 `[B]` from `[B, vocab_size]`."""
        if kind == "greedy":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / self.temperature
        if kind == "filter":
            # One order serves both: top_p counts among what top_k has left.
            ordered = jnp.sort(logits, axis=-1, descending=True)
            within = jnp.arange(ordered.shape[-1]) < self.top_k
            probability = jax.nn.softmax(jnp.where(within, ordered, -jnp.inf), axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            kept = within & (before < self.top_p)
            least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
