"""Text generation with a key/value cache: two programs, whatever the prompts and their number.

`_prefill` runs over the prompts, `_decode` token by token. Both are compiled for a batch size and
the buckets of the prompts' and the texts' lengths; all else that varies is traced.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax.models.generation.prompts import Prompts, bucket
from q4jax.models.generation.sampling import Kind, Sampling
from q4jax.models.llama.decoder import Llama, check_token_ids
from q4jax.models.llama.kv_cache import KVCache

# Stop tokens are an array of a multiple of so many.
_STOPS = 8


def generate(
    model: Llama,
    input_ids: jax.Array | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    callback: Callable[[np.ndarray], None] | None = None,
) -> jax.Array:
    """Continues each prompt of a batch.

    Prompts are padded to one of few lengths, and so is the cache: another length or another setting
    of the sampling rarely compiles anything. Not to be called under `jax.jit`: it compiles what it
    runs.

    Args:
      model: a `Llama`, dense, quantized or with adapters.
      input_ids: int `[B, P]`, or B lists of tokens of any lengths.
      max_new_tokens: how many tokens to add at most.
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits /
        temperature).
      top_k: draw from the `top_k` likeliest tokens only.
      top_p: draw from the likeliest tokens that together have at least this probability; after
        `top_k`.
      eos_token_id: a row stops after it has produced this token, or one of these.
      pad_token_id: what follows in a stopped row, and precedes the shorter of several lists; None:
        the (first) `eos_token_id`, else 0.
      attention_mask: bool or int `[B, P]`, 0 where a prompt is padding; None: nowhere.
      rng: a JAX random key; needed when `temperature` is above 0.
      callback: called with the new tokens, int32 `[B]`, as soon as they are there, step by step.

    Returns:
      int32 `[B, P + max_new_tokens]`, prompts included; of lists, P is the longest one's length.

    Raises:
      ValueError: an argument out of its range, a token that is not in the vocabulary, or a text
        longer than the model's context. The message names the argument, its value and what is
        allowed.

    Example:
      >>> from flax import nnx
      >>> from q4jax.models import Llama, LlamaConfig, generate
      >>> model = Llama(LlamaConfig(64, 32, 48, 2, 4, 4, 8), rngs=nnx.Rngs(0))
      >>> generate(model, [[1, 2, 3], [4]], 5).shape
      (2, 8)
    """
    vocab_size = model.config.vocab_size
    kind, sampling = Sampling.checked(temperature, top_k, top_p, vocab_size)
    if kind != "greedy" and rng is None:
        raise ValueError(f"temperature={temperature} draws at random: pass rng, a JAX random key")
    stops = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())
    check_token_ids("eos_token_id", stops, vocab_size)
    pad = pad_token_id if pad_token_id is not None else (stops or (0,))[0]
    check_token_ids("pad_token_id", pad, vocab_size)
    prompts = Prompts.of(input_ids, attention_mask, pad, vocab_size)
    _check_length(prompts.longest, max_new_tokens, model.config.context_length)
    if max_new_tokens == 0:
        return jnp.asarray(prompts.shown)
    key = jax.random.key(0) if rng is None else rng
    choice = _Choice(sampling, key, _padded(stops), np.int32(pad))

    graphdef, state = nnx.split(model)
    run = _prefill(graphdef, kind, bucket(max_new_tokens), state, choice, prompts.ids, prompts.mask)
    if callback is None:
        run = _decode(graphdef, kind, state, choice, run, np.int32(max_new_tokens))
    else:
        callback(np.array(run.last))
        for step in range(1, max_new_tokens):
            if np.all(run.done):
                break
            run = _decode(graphdef, kind, state, choice, run, np.int32(step + 1))
            callback(np.array(run.last))
    new = np.asarray(run.tokens)[:, :max_new_tokens]
    return jnp.asarray(np.concatenate([prompts.shown, new], axis=1))


class _Choice(NamedTuple):
    """How tokens are chosen, and which of them end a row."""

    sampling: Sampling
    key: jax.Array
    stops: np.ndarray  # int32; -1, which no token is, where there are fewer
    pad: np.int32


class _Run(NamedTuple):
    """What one step hands to the next."""

    step: jax.Array  # int32: tokens produced
    tokens: jax.Array  # int32 [B, new]
    last: jax.Array  # int32 [B]: the token that the next step feeds in
    done: jax.Array  # bool [B]
    cache: KVCache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graphdef: Any,
    kind: Kind,
    slots: int,
    state: Any,
    choice: _Choice,
    ids: jax.Array,
    mask: jax.Array,
) -> _Run:
    """The first token, in a run that has room for `slots` of them."""
    model: Llama = nnx.merge(graphdef, state)
    batch, length = ids.shape
    dtype = jax.eval_shape(model.embed_tokens, ids).dtype
    start = _Run(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, slots), choice.pad, jnp.int32),
        last=ids[:, -1],
        done=jnp.zeros(batch, bool),
        cache=KVCache.empty(model.config, batch, length + slots, dtype),
    )
    return _extend(model, kind, choice, start, ids, mask)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _decode(
    graphdef: Any, kind: Kind, state: Any, choice: _Choice, run: _Run, until: jax.Array
) -> _Run:
    """Token by token, until there are `until` of them or every row has stopped."""
    model: Llama = nnx.merge(graphdef, state)
    return jax.lax.while_loop(
        lambda run: (run.step < until) & ~jnp.all(run.done),
        lambda run: _extend(model, kind, choice, run, run.last[:, None], None),
        run,
    )


def _extend(
    model: Llama,
    kind: Kind,
    choice: _Choice,
    run: _Run,
    ids: jax.Array,
    mask: jax.Array | None,
) -> _Run:
    """Runs the model over `ids` and appends one token to the rows that have not stopped."""
    hidden, cache = model.hidden_states(ids, attention_mask=mask, cache=run.cache)
    assert cache is not None
    key = jax.random.fold_in(choice.key, run.step)
    chosen = choice.sampling.choose(kind, model.logits(hidden[:, -1]), key)
    chosen = jnp.where(run.done, choice.pad, chosen)
    tokens = jax.lax.dynamic_update_slice(run.tokens, chosen[:, None], (0, run.step))
    done = run.done | jnp.isin(chosen, choice.stops)
    return _Run(run.step + 1, tokens, chosen, done, cache)


def _padded(stops: tuple[int, ...]) -> np.ndarray:
    """The stop tokens, in an array of one of few lengths."""
    found = np.full(_STOPS * max(1, -(-len(stops) // _STOPS)), -1, np.int32)
    found[: len(stops)] = stops
    return found


def _check_length(longest: int, max_new_tokens: int, context: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    total = longest + max_new_tokens
    if total > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens={max_new_tokens}: "
            f"{total} is above the model's context of {context}"
        )
