"""The entries of a manifest, checked: what `manifest.read` trusts to place and allocate arrays."""

import collections
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.tree_util import SequenceKey

from q4jax.tree.leaves import Path, describe, name_of

SCALARS = (bool, int, float, str)
# One leaf: path, leaf (its description), kind; of an array data and sha256, of a scalar value.
Entry = dict[str, Any]

_ARRAY_KEYS = {"path", "leaf", "kind", "data", "sha256"}
_KEYS = {
    "jax": _ARRAY_KEYS,
    "numpy": _ARRAY_KEYS,
    "key": _ARRAY_KEYS | {"impl"},
    "scalar": {"path", "leaf", "kind", "value"},
}
SHA256 = re.compile(r"[0-9a-f]{64}")
_ARRAY = re.compile(r"([a-z][a-z0-9_]*)\[((?:\d{1,18}(?:, \d{1,18})*)?)\]")
# Names of trees are made by recursion, so they end somewhere. NumPy's arrays have up to 64 axes.
_MAX_DEPTH, _MAX_AXES = 256, 64
# Positions of lists that hold no leaf: None, or a container without leaves.
_MAX_GAPS = 1_000_000


def array_of(description: Any) -> jax.ShapeDtypeStruct:
    """Return dtype and shape of the array that `describe` describes, such as `uint8[2, 32]`.

    Raises:
      ValueError: it is no description of an array that can be stored.
    """
    match = _ARRAY.fullmatch(description) if isinstance(description, str) else None
    if match is None:
        raise ValueError(f"{shown(description)} is not dtype and shape of an array of numbers")
    name, sizes = match.groups()
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise ValueError(f"{shown(description)} has no dtype that q4jax knows") from None
    shape = tuple(int(size) for size in sizes.split(", ")) if sizes else ()
    if dtype.hasobject or dtype.name != name:
        raise ValueError(f"{shown(description)} has no dtype that can be stored")
    if len(shape) > _MAX_AXES or math.prod(shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"{shown(description)} is larger than an array can be")
    return jax.ShapeDtypeStruct(shape, dtype)


def read_path(keys: Any) -> Path:
    """Return the path of an entry: keys as they are, the index into a list as a list of it.

    Raises:
      ValueError: it is no path.
    """
    if not isinstance(keys, list):
        raise ValueError(f"path must be a list of keys, got {shown(keys)}")
    for key in keys:
        listed = isinstance(key, list) and len(key) == 1 and type(key[0]) is int
        if not (listed and 0 <= key[0] < 2**31) and type(key) not in (str, int):
            raise ValueError(f"a key of path must be str, int or [index], got {shown(key)}")
    return tuple(SequenceKey(key[0]) if isinstance(key, list) else key for key in keys)


def check_entry(entry: Entry) -> None:
    """Raise ValueError unless the entry has the keys of its kind, and values that fit each other.

    Its path is left to `read_path` and `check_paths`.
    """
    kind = entry.get("kind")
    keys = _KEYS.get(kind) if isinstance(kind, str) else None
    if keys is None:
        raise ValueError(f"kind must be one of {', '.join(_KEYS)}, got {shown(kind)}")
    if entry.keys() != keys:
        raise ValueError(f"its keys must be {', '.join(sorted(keys))}; got {shown(sorted(entry))}")
    if kind == "scalar":
        value = entry["value"]
        if type(value) not in SCALARS or entry["leaf"] != type(value).__name__:
            raise ValueError(f"{shown(value)} is not the {shown(entry['leaf'])} of its entry")
        return
    if not isinstance(entry["sha256"], str) or SHA256.fullmatch(entry["sha256"]) is None:
        raise ValueError(f"sha256 must be 64 digits, got {shown(entry['sha256'])}")
    leaf = describe(_key_of(entry) if kind == "key" else array_of(entry["data"]))
    if entry["leaf"] != leaf:
        raise ValueError(f"leaf must be {leaf}, got {shown(entry['leaf'])}")


def _key_of(entry: Entry) -> Any:
    """Return the abstract PRNG key whose words an entry describes."""
    words, impl = array_of(entry["data"]), entry["impl"]
    if not isinstance(impl, str):  # None would be the default
        raise ValueError(f"impl must be the name of a PRNG, got {shown(impl)}")
    try:
        return jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=impl), words)
    except (ValueError, TypeError, IndexError, AssertionError):
        raise ValueError(f"{entry['data']} are not the words of a {shown(impl)} key") from None


def check_paths(paths: Iterable[Path]) -> None:
    """Raise ValueError unless a tree can have leaves at all these paths.

    No path is empty, too deep, or leads through another leaf; no two have one name; lists have few
    positions without a leaf, so that a tree takes memory for what it holds.
    """
    found = list(paths)
    names: set[str] = set()
    lists: dict[Path, set[int]] = collections.defaultdict(set)
    for path in found:
        if not 0 < len(path) <= _MAX_DEPTH:
            raise ValueError(f"a path must have 1 to {_MAX_DEPTH} keys, got {len(path)}")
        name = name_of(path)
        if name in names:
            raise ValueError(f"two leaves are named {shown(name)}")
        names.add(name)
        for at, key in enumerate(path):
            if isinstance(key, SequenceKey):
                lists[path[:at]].add(key.idx)
    leaves = set(found)
    for path in found:
        if any(path[:end] in leaves for end in range(1, len(path))):
            raise ValueError(f"{shown(name_of(path))} is below another leaf")
    gaps = sum(1 + max(indices) - len(indices) for indices in lists.values())
    if gaps > _MAX_GAPS:
        raise ValueError(f"its lists have {gaps} positions without a leaf, up to {_MAX_GAPS} may")


def shown(value: Any) -> str:
    """Return a value for an error: on one line, and short whatever it is."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def one_line(error: BaseException) -> str:
    """Return the text of an error's first cause, on one line and of a bounded length."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
