"""Adapters and weights of an embedding that is also the model's head."""

import dataclasses
from typing import Any

import numpy as np

from q4jax.convert.config import HEAD
from q4jax.interop.peft.patterns import is_saved
from q4jax.interop.peft.tensors import WRAPPED, AdapterFiles, Factors

EMBEDDING = "embed_tokens"


def is_tied(model: Any) -> bool:
    """Return whether a model's config says that its head is the embedding."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def untie(model: Any, files: AdapterFiles) -> AdapterFiles:
    """Return the files without what they repeat for a head that is the embedding.

    Here the embedding's adapter acts on the head too. In PEFT it does with `ensure_weight_tying`.

    Raises:
      NotImplementedError: the files change the embedding or the head, not both alike.
    """
    if not is_tied(model):
        return files
    factors, weights = dict(files.factors), dict(files.weights)
    embedding = next((f for m, f in factors.items() if m.endswith(EMBEDDING)), None)
    head = factors.pop(HEAD, None)
    saved = next((w for (m, _), w in weights.items() if m.endswith(EMBEDDING)), None)
    # A copy of the head's weight is one of the embedding's.
    copies = [weights.pop((name, "weight"), None) for name in (HEAD, HEAD + WRAPPED)]
    trained = is_saved(HEAD, files.config.saved) or is_saved(
        f"model.{EMBEDDING}", files.config.saved
    )
    unlike = (head is not None and not _is_transposed(head, embedding)) or (
        (embedding is not None or trained) and not files.config.tied
    )
    for copy in copies:
        if copy is not None and saved is None:
            weights[f"model.{EMBEDDING}", "weight"] = saved = copy
        unlike |= copy is not None and saved is not None and not np.array_equal(copy, saved)
    if unlike:
        raise NotImplementedError(
            f"the model's head is its embedding (tie_word_embeddings), and the files change one of "
            f"{EMBEDDING} and {HEAD} without the other; PEFT's ensure_weight_tying changes both"
        )
    return dataclasses.replace(files, factors=factors, weights=weights)


def _is_transposed(head: Factors, embedding: Factors | None) -> bool:
    return (
        embedding is not None
        and np.array_equal(head.a, embedding.b.T)
        and np.array_equal(head.b, embedding.a.T)
    )
