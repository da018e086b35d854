"""Choosing the next token from logits: greedy, by sampling, or by top-k and top-p sampling."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Method = Literal["greedy", "sample", "filter"]


class Sampling(NamedTuple):
    """Sampling parameters as traced scalars, so that new values do not recompile."""

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32

    @classmethod
    def from_arguments(
        cls, temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
    ) -> "tuple[Method, Sampling]":
        """Check the arguments of `generate`; return the static method and the parameters.

        Raises:
          ValueError: an argument is out of range.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and not 1 <= top_k <= vocab_size:
            raise ValueError(f"top_k must be from 1 to vocab_size={vocab_size}, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        method: Method = "sample" if top_k is None and top_p is None else "filter"
        parameters = cls(
            np.float32(temperature),
            np.int32(vocab_size if top_k is None else top_k),
            np.float32(np.inf if top_p is None else top_p),
        )
        return method if temperature else "greedy", parameters

    def choose(self, method: Method, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Return tokens, int32 `[B]`, for logits `[B, vocab_size]`."""
        if method == "greedy":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / self.temperature
        if method == "filter":
            # top_p applies to the tokens that top_k keeps, so one sort serves both.
            ordered = jnp.sort(logits, axis=-1, descending=True)
            within = jnp.arange(ordered.shape[-1]) < self.top_k
            probability = jax.nn.softmax(jnp.where(within, ordered, -jnp.inf), axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            kept = within & (before < self.top_p)
            least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
