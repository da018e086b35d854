"""Trees of weights by name: from tensors, and to a flat dict."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from q4jax.interop.bitsandbytes.weight_keys import CONTAINERS, read_weight, sort_names
from q4jax.interop.placement import Placement, place
from q4jax.interop.safetensors.reader import Entry, aligned_empty
from q4jax.interop.safetensors.writer import Layout
from q4jax.ops.params import Params4bit

Tree = dict[str, Params4bit | Array]


def read_tensors(
    tensors: Mapping[str, np.ndarray],
    layouts: Mapping[str, Layout | Entry],
    strict: bool,
    sharding: Placement | None,
) -> Tree:
    """All tensors, with 4-bit weights rebuilt; errors as `from_state_dict` documents them."""
    contents = sort_names(layouts)
    report_extra(contents.extra, strict)
    others = set(contents.others)
    found: Tree = {}
    for name in layouts:  # in the order of the state dict
        if name in contents.weights:
            found[name] = read_weight(contents.weights[name], tensors, sharding)
        elif name in others:
            found[name] = place(name, tensors[name], sharding)
    return found


def report_extra(extra: list[str], strict: bool, what: str = "keys below 4-bit weights") -> None:
    """Keys that nothing reads: ValueError if `strict`, else UserWarning."""
    if extra and strict:
        raise ValueError(f"unknown {what}: {extra}")
    if extra:
        warnings.warn(f"left out unknown {what}: {extra}", stacklevel=4)


def own_copy(name: str, value: Any) -> np.ndarray:
    """A value as numpy, in memory that nobody else writes to."""
    if hasattr(value, "detach"):  # torch, whose bfloat16 numpy does not know
        torch = sys.modules["torch"]
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.view(torch.int16).numpy().view(CONTAINERS["bfloat16"])
        value = np.asarray(value)
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise TypeError(f"{name} must hold numbers, got {array.dtype}")
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name; TypeError for a module, ValueError where two have one name."""
    if isinstance(tree, nnx.Module | nnx.State):
        raise TypeError(
            f"tree must hold weights by name, got a {type(tree).__name__}; q4jax.models."
            "save_pretrained and q4jax.checkpoint.save write models"
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
