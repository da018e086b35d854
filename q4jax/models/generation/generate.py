"""Text generation with a key/value cache, in two compiled programs.

`_prefill` runs over the prompts, `_decode` token by token. Both recompile for another batch size or
length bucket only; sampling parameters and stop tokens are traced.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.kv_cache import KVCache
from q4jax.models.decoder.on_mesh import run_for_compiler
from q4jax.models.decoder.places import of_cache
from q4jax.models.generation.arguments import integer, random_key, token_ids
from q4jax.models.generation.prompts import Prompts, bucket
from q4jax.models.generation.sampling import Method, Sampling
from q4jax.sharding.axes import MeshAxes

# The array of stop tokens is padded to a multiple of this, so that few lengths are compiled.
_STOP_SLOTS = 8


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
    """Generate a continuation of each prompt in a batch.

    Prompts and cache are padded to a few lengths, so another length or sampling parameter rarely
    recompiles. Do not call it under `jax.jit`: it compiles its own programs.

    Args:
      model: a `Llama`, dense, quantized or with adapters.
      input_ids: int `[B, P]`, or B lists of tokens of any lengths.
      max_new_tokens: the largest number of tokens to add.
      temperature: 0 takes the most likely token; above 0, tokens are sampled from
        softmax(logits / temperature). Numbers may be Python's, or scalars of NumPy or JAX.
      top_k: sample from the `top_k` most likely tokens only; None or 0: from all.
      top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least
        `top_p`, after `top_k`; None or 1: from all.
      eos_token_id: token or tokens that end a row.
      pad_token_id: token after the end of a row, and before the shorter of several lists; None: the
        first `eos_token_id`, or 0.
      attention_mask: bool or int `[B, P]`, 0 at padding; None: no padding.
      rng: a JAX random key; required if `temperature` is above 0.
      callback: function that is called with the new tokens, int32 `[B]`, after each step.

    Returns:
      int32 `[B, P + max_new_tokens]`, prompts included. For lists, P is the longest length.

    Raises:
      ValueError: an argument is out of range or of another type, a token is not in the vocabulary,
        or the text would be longer than the model's context. The message names the argument, its
        value and what is allowed.
      TypeError: the model is no `Llama`.

    Examples:
      >>> from flax import nnx
      >>> from q4jax.models import Llama, LlamaConfig, generate
      >>> model = Llama(LlamaConfig(64, 32, 48, 2, 4, 4, 8), rngs=nnx.Rngs(0))
      >>> generate(model, [[1, 2, 3], [4]], 5).shape
      (2, 8)
    """
    if not isinstance(model, Llama):
        raise TypeError(f"model must be a q4jax.models.Llama, got {type(model).__name__}")
    vocab_size, context = model.config.vocab_size, model.config.context_length
    method, sampling = Sampling.from_arguments(temperature, top_k, top_p, vocab_size)
    if method != "greedy" and rng is None:
        raise ValueError(f"temperature={temperature} draws at random: pass rng, a JAX random key")
    key = jax.random.key(0) if rng is None else random_key("rng", rng)
    stops = () if eos_token_id is None else token_ids("eos_token_id", eos_token_id, vocab_size)
    allowed = f"from 0 to vocab_size-1={vocab_size - 1}"
    pad = (stops or (0,))[0]
    if pad_token_id is not None:
        pad = integer("pad_token_id", pad_token_id, 0, vocab_size - 1, allowed)
    if callback is not None and not callable(callback):
        raise ValueError(f"callback must be a function or None, got {callback!r}")
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 0, math.inf, "at least 0")
    prompts = Prompts.from_ids(input_ids, attention_mask, pad, vocab_size)
    _check_length(prompts.longest, max_new_tokens, context)
    if max_new_tokens == 0:
        return jnp.asarray(prompts.shown)
    choice = _Choice(sampling, key, _padded(stops), np.int32(pad))

    graphdef, state = nnx.split(model)
    run = _prefill(
        graphdef, method, bucket(max_new_tokens), state, choice, prompts.ids, prompts.mask
    )
    if callback is None:
        run = _decode(graphdef, method, state, choice, run, np.int32(max_new_tokens))
    else:
        callback(np.array(run.last))
        for step in range(1, max_new_tokens):
            if np.all(run.done):
                break
            run = _decode(graphdef, method, state, choice, run, np.int32(step + 1))
            callback(np.array(run.last))
    new = np.asarray(run.tokens)[:, :max_new_tokens]
    return jnp.asarray(np.concatenate([prompts.shown, new], axis=1))


class _Choice(NamedTuple):
    """Traced inputs that choose tokens and end rows."""

    sampling: Sampling
    key: jax.Array
    stops: np.ndarray  # int32, padded with -1, which is no token
    pad: np.int32


class _Run(NamedTuple):
    """State of the generation loop."""

    step: jax.Array  # int32: number of new tokens
    tokens: jax.Array  # int32 [B, new]
    last: jax.Array  # int32 [B]: input of the next step
    done: jax.Array  # bool [B]
    cache: KVCache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graphdef: Any,
    method: Method,
    slots: int,
    state: Any,
    choice: _Choice,
    ids: jax.Array,
    mask: jax.Array,
) -> _Run:
    """Run the prompts and append the first token, with room for `slots` tokens."""
    batch, length = ids.shape

    def first(model: Llama, ids: jax.Array, mask: jax.Array, choice: _Choice) -> _Run:
        dtype = jax.eval_shape(model.embed_tokens, ids).dtype
        start = _Run(
            step=jnp.zeros((), jnp.int32),
            tokens=jnp.full((batch, slots), choice.pad, jnp.int32),
            last=ids[:, -1],
            done=jnp.zeros(batch, bool),
            cache=KVCache.empty(model.stacks, batch, length + slots, dtype),
        )
        return _extend(model, method, choice, start, ids, mask)

    return run_for_compiler(nnx.merge(graphdef, state), first, _places_of_run, ids, mask, choice)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _decode(
    graphdef: Any, method: Method, state: Any, choice: _Choice, run: _Run, until: jax.Array
) -> _Run:
    """Append tokens until there are `until`, or every row has stopped."""

    def rest(model: Llama, run: _Run, choice: _Choice, until: jax.Array) -> _Run:
        return jax.lax.while_loop(
            lambda run: (run.step < until) & ~jnp.all(run.done),
            lambda run: _extend(model, method, choice, run, run.last[:, None], None),
            run,
        )

    return run_for_compiler(nnx.merge(graphdef, state), rest, _places_of_run, run, choice, until)


def _places_of_run(model: Llama, batch: MeshAxes, *_: Any) -> Any:
    """Return a `_Run` with the PartitionSpecs of its arrays on Explicit mesh axes."""
    rows: Any = PartitionSpec(batch or None)
    whole: Any = PartitionSpec()
    return _Run(whole, rows, rows, rows, of_cache(model, batch))


def _extend(
    model: Llama, method: Method, choice: _Choice, run: _Run, ids: jax.Array, mask: jax.Array | None
) -> _Run:
    """Run the model on `ids` and append one token to each row that has not stopped."""
    hidden, cache = model.hidden_states(ids, attention_mask=mask, cache=run.cache)
    assert cache is not None
    key = jax.random.fold_in(choice.key, run.step)
    chosen = choice.sampling.choose(method, model.logits(hidden[:, -1]), key)
    chosen = jnp.where(run.done, choice.pad, chosen)
    tokens = jax.lax.dynamic_update_slice(run.tokens, chosen[:, None], (np.int32(0), run.step))
    done = run.done | jnp.isin(chosen, choice.stops)
    return _Run(run.step + 1, tokens, chosen, done, cache)


def _padded(stops: tuple[int, ...]) -> np.ndarray:
    """Return the stop tokens, padded with -1 to a multiple of `_STOP_SLOTS`."""
    found = np.full(_STOP_SLOTS * max(1, -(-len(stops) // _STOP_SLOTS)), -1, np.int32)
    found[: len(stops)] = stops
    return found


def _check_length(longest: int, max_new_tokens: int, context: int) -> None:
    total = longest + max_new_tokens
    if total > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens={max_new_tokens}: "
            f"{total} is above the model's context of {context}"
        )
