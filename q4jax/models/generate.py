"""Text generation with a key/value cache: one compiled program per shape of the prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.cache import KVCache
from q4jax.models.llama import Llama


def generate(
    model: Llama,
    input_ids: jax.Array,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: jax.Array | None = None,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Continues each prompt of a batch.

    Args:
      model: a `Llama`, dense, quantized or with adapters.
      input_ids: int `[B, P]`; prompts of different lengths are padded on the left.
      max_new_tokens: how many tokens to add at most.
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits /
        temperature).
      top_k: draw from the `top_k` likeliest tokens only.
      top_p: draw from the likeliest tokens that together have at least this probability.
      eos_token_id: a row stops after it has produced this token, or one of these.
      pad_token_id: what follows in a stopped row; None: the (first) `eos_token_id`, else 0.
      attention_mask: bool or int `[B, P]`, 0 where a prompt is padding; None: nowhere.
      rng: a JAX random key; needed when `temperature` is above 0.

    Returns:
      int32 `[B, P + max_new_tokens]`, prompts included.

    Raises:
      ValueError: an argument out of its range, or a text longer than the model's context.
        The message names the argument, its value and what is allowed.
    """
    input_ids = jnp.asarray(input_ids)
    _check(model, input_ids, max_new_tokens, attention_mask)
    sampling = _Sampling.checked(temperature, top_k, top_p, model.config.vocab_size)
    if sampling.draws and rng is None:
        raise ValueError(f"temperature={temperature} draws at random: pass rng, a JAX random key")
    stops = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())
    pad = pad_token_id if pad_token_id is not None else (stops or (0,))[0]
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask
    key = jax.random.key(0) if rng is None else rng
    return _generate(
        model, input_ids.astype(jnp.int32), mask, key, int(max_new_tokens), sampling, stops, pad
    )


class _Sampling(NamedTuple):
    """How to choose a token; static, so each choice is a program of its own."""

    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def checked(
        cls, temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
    ) -> "_Sampling":
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and not 1 <= top_k <= vocab_size:
            raise ValueError(f"top_k must be from 1 to vocab_size={vocab_size}, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        return cls(float(temperature), top_k, top_p)

    @property
    def draws(self) -> bool:
        return self.temperature > 0

    def choose(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """int32 `[B]` from `[B, vocab_size]`."""
        if not self.draws:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k is not None:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probability = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            least = jnp.min(
                jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True
            )
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


class _State(NamedTuple):
    """What one decoding step hands to the next."""

    step: jax.Array  # int32: tokens produced
    tokens: jax.Array  # int32 [B, P + max_new_tokens]
    last: jax.Array  # int32 [B]: the token that the next step feeds in
    done: jax.Array  # bool [B]
    cache: KVCache


@nnx.jit(static_argnums=(4, 5, 6, 7), graph_updates=False)
def _generate(
    model: Llama,
    prompt: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    sampling: _Sampling,
    stops: tuple[int, ...],
    pad: int,
) -> jax.Array:
    batch, length = prompt.shape
    capacity = length + max_new_tokens
    tokens = jnp.full((batch, capacity), pad, jnp.int32).at[:, :length].set(prompt)
    if max_new_tokens == 0:
        return tokens

    def extend(state: _State, ids: jax.Array, ids_mask: jax.Array | None) -> _State:
        """Runs the model over `ids` and appends one token to the rows that have not stopped."""
        step, tokens, _, done, cache = state
        hidden, new_cache = model.hidden_states(ids, attention_mask=ids_mask, cache=cache)
        assert new_cache is not None
        chosen = sampling.choose(model.logits(hidden[:, -1]), jax.random.fold_in(key, step))
        chosen = jnp.where(done, pad, chosen)
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (0, length + step))
        done = done | jnp.isin(chosen, jnp.array(stops, jnp.int32))
        return _State(step + 1, tokens, chosen, done, new_cache)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    dtype = jax.eval_shape(model.embed_tokens, prompt).dtype
    cache = KVCache.empty(model.config, batch, capacity, dtype)
    zero, nobody = jnp.zeros((), jnp.int32), jnp.zeros(batch, bool)
    prefilled = extend(_State(zero, tokens, prompt[:, -1], nobody, cache), prompt, mask)
    decoded = jax.lax.while_loop(
        unfinished, lambda state: extend(state, state.last[:, None], None), prefilled
    )
    return decoded.tokens


def _check(
    model: Llama, input_ids: jax.Array, max_new_tokens: int, attention_mask: jax.Array | None
) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [batch, tokens] with tokens >= 1, got {input_ids.shape}"
        )
    if not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    total, limit = input_ids.shape[1] + max_new_tokens, model.config.context_length
    if total > limit:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens and max_new_tokens={max_new_tokens}: "
            f"{total} is above the context of {limit}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be {input_ids.shape} as input_ids, got {attention_mask.shape}"
        )
