"""Where the tokens of a batch stand: padding, the documents of a row, and positions in them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.models.decoder.kv_cache import KVCache

_INT32 = np.iinfo(np.int32)


class Sequences(NamedTuple):
    """T queries, and the S slots of their keys; without a cache, S = T.

    Attributes:
      positions: int `[B, T]`, positions of the queries.
      start: slot of the first query; those of the other queries follow.
      real: bool `[B, S]`, False at padding and in unset slots; None: all slots hold tokens.
      segments: int `[B, S]`, the document of each token; None: a row is one document.
      ranks: int32 `[B, S]`, the number of earlier tokens of the same document.
    """

    positions: jax.Array
    start: jax.Array | int
    real: jax.Array | None
    segments: jax.Array | None
    ranks: jax.Array

    @classmethod
    def from_arguments(
        cls,
        shape: tuple[int, ...],
        positions: Any,
        attention_mask: Any,
        segment_ids: Any,
        cache: KVCache | None,
    ) -> "tuple[Sequences, KVCache | None]":
        """Check the arguments of a model call; return its sequences and the opened cache.

        Args:
          shape: `[B, T]` of the token ids.
          positions: as in `Llama`; the other arguments, too.
          attention_mask: as above.
          segment_ids: as above.
          cache: as above.
        """
        if cache is not None and segment_ids is not None:
            raise ValueError(
                "segment_ids must be None with a cache: each of its rows is one document"
            )
        positions, mask, segments = (
            None if value is None else _checked(name, value, shape)
            for name, value in (
                ("positions", positions),
                ("attention_mask", attention_mask),
                ("segment_ids", segment_ids),
            )
        )
        if positions is not None:
            _check_positions(shape, positions, mask, segments, cache)
        real, segments, positions = (
            None if array is None else jnp.broadcast_to(jnp.asarray(array, dtype), shape)
            for array, dtype in ((mask, bool), (segments, None), (positions, jnp.int32))
        )
        start: jax.Array | int = 0
        if cache is not None:
            start = cache.length
            cache = cache.open(jnp.ones(shape, bool) if real is None else real)
            real = cache.mask
        ranks = _ranks(shape, real, segments)
        if positions is None:
            positions = jax.lax.dynamic_slice_in_dim(ranks, start, shape[1], axis=1)
        return cls(positions, start, real, segments, ranks), cache


def _ranks(shape: tuple[int, ...], real: jax.Array | None, segments: jax.Array | None) -> jax.Array:
    """Return the number of earlier tokens of the same document, int32 `[B, S]`."""
    if real is None:
        real = jnp.ones(shape, bool)
    if segments is None:
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    else:
        seen = (segments[:, :, None] == segments[:, None, :]) & real[:, None, :]
        count = jnp.sum(jnp.tril(seen), axis=-1, dtype=jnp.int32)
    return jnp.maximum(count - 1, 0)


def _checked(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """Return an argument as an array, on the host unless it is JAX's; ValueError if it is wrong."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.shape not in (shape, (1, shape[1])):
        raise ValueError(f"{name} must be {shape} as input_ids, got {array.shape}")
    if name == "attention_mask":
        check_mask(array)
    elif not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if isinstance(array, np.ndarray) and array.size and array.dtype != bool:
        # JAX would wrap larger values around, so that two documents become one.
        for value in (array.min(), array.max()):
            if not _INT32.min <= value <= _INT32.max:
                raise ValueError(f"{name} must be int32, got {value}")
    return array


def check_mask(mask: Any) -> None:
    """Raise ValueError unless a mask is bool or int, and its values, where concrete, 0 or 1."""
    if not jnp.issubdtype(mask.dtype, jnp.integer) and mask.dtype != bool:
        raise ValueError(f"attention_mask must be integers or bool, got {mask.dtype}")
    if isinstance(mask, jax.core.Tracer):
        return
    found = np.asarray(mask)
    other = found[(found != 0) & (found != 1)]
    if other.size:
        raise ValueError(
            f"attention_mask must be 0 or 1, got {other[0]}; segment_ids tells the documents of a "
            "row apart"
        )


def _check_positions(
    shape: tuple[int, ...], positions: Any, mask: Any, segments: Any, cache: KVCache | None
) -> None:
    """Raise ValueError if concrete positions do not rise from token to token of a document."""
    if any(isinstance(array, jax.core.Tracer) for array in (positions, mask, segments)):
        return
    rows, kept, documents = (
        np.broadcast_to(np.asarray(default if array is None else array), shape)
        for array, default in ((positions, 0), (mask, 1), (segments, 0))
    )
    # Positions rise from 0 on, so none is below the number of tokens before it.
    least = np.zeros(shape[0], int)
    if cache is not None and not isinstance(cache.mask, jax.core.Tracer):
        least = np.asarray(cache.mask).sum(axis=1)
    for row in range(shape[0]):
        real = kept[row].astype(bool)
        order = np.argsort(documents[row][real], kind="stable")
        found, document = (array[row][real][order].astype(np.int64) for array in (rows, documents))
        if (found < least[row]).any():
            raise ValueError(
                f"positions must be at least {least[row]}, the number of tokens in the cache, got "
                f"{found.min()} in row {row}"
            )
        back = np.flatnonzero((np.diff(found) <= 0) & (np.diff(document) == 0))
        if back.size:
            before, after = found[back[0] : back[0] + 2]
            raise ValueError(
                f"positions must rise from token to token, got {after} after {before} in row "
                f"{row}; segment_ids tells the documents of a row apart"
            )


def check_token_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Raise ValueError if concrete token ids are not in the vocabulary."""
    if isinstance(ids, jax.core.Tracer):
        return
    found = np.asarray(ids)
    wrong = found[(found < 0) | (found >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{name} must be from 0 to vocab_size-1={vocab_size - 1}, got {wrong.flat[0]}"
        )
