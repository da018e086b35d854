"""Nested dicts and lists of weights as a flat dict."""

from collections.abc import Mapping
from typing import Any

from flax import nnx


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves by dotted name.

    Raises:
      TypeError: the tree is an nnx module or state.
      ValueError: two leaves have the same name.
    """
    if isinstance(tree, nnx.Module | nnx.State):
        raise TypeError(
            f"tree must hold weights by name, got a {type(tree).__name__}; bitsandbytes."
            "named_parameters names those of a model, q4jax.models.save_pretrained and "
            "q4jax.checkpoint.save write models"
        )
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        for name, leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items():
            if name in flat:
                raise ValueError(f"two tensors of the tree are named {name!r}")
            flat[name] = leaf
    return flat
