"""Choosing the next token from logits: greedy, by sampling, or by top-k and top-p sampling."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.models.generation.arguments import integer, number

Method = Literal["greedy", "sample", "filter"]
# XLA takes subnormal numbers for 0, also in the reciprocal that it may multiply by.
_TINY = float(np.finfo(np.float32).tiny)


class Sampling(NamedTuple):
    """Sampling parameters as traced scalars, so that new values do not recompile."""

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32

    @classmethod
    def from_arguments(
        cls, temperature: Any, top_k: Any, top_p: Any, vocab_size: int
    ) -> "tuple[Method, Sampling]":
        """Check the arguments of `generate`; return the static method and the parameters.

        Raises:
          ValueError: an argument is out of range, or no number.
        """
        temperature = number("temperature", temperature)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        allowed = f"from 0 to vocab_size={vocab_size}"
        top_k = 0 if top_k is None else integer("top_k", top_k, 0, vocab_size, allowed)
        top_p = 1.0 if top_p is None else number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        method: Method = "sample" if top_k == 0 and top_p == 1 else "filter"
        # Rounded sums of probabilities may exceed 1 before the last token.
        parameters = cls(
            np.float32(min(max(temperature, _TINY), 1 / _TINY)),
            np.int32(top_k or vocab_size),
            np.float32(math.inf if top_p == 1 else max(top_p, _TINY)),
        )
        return method if temperature else "greedy", parameters

    def choose(self, method: Method, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Return tokens, int32 `[B]`, for logits `[B, vocab_size]`."""
        if method == "greedy":
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32)
        # The largest is 0 at any temperature, and the others may become -inf.
        logits = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        if method == "sample":
            return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
        # A complete top_k is a sort that orders equal logits too, so that exactly top_k are kept.
        logits, order = jax.lax.top_k(logits, logits.shape[-1])
        within = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] < self.top_k
        # top_p applies to the tokens that top_k keeps, so one sort serves both.
        probability = jax.nn.softmax(jnp.where(within, logits, -jnp.inf), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(within & (before < self.top_p), logits, -jnp.inf)
        chosen = jax.random.categorical(key, kept, axis=-1)[:, None]
        return jnp.take_along_axis(order, chosen, axis=-1)[:, 0].astype(jnp.int32)
