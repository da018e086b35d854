"""The manifest of a checkpoint: dtype, shape and sha256 of every leaf, and checks against it."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import SequenceKey

from q4jax.core.state import split_tag
from q4jax.tree.fingerprint import combine, digest
from q4jax.tree.leaves import Leaves, Path, describe, find_weights, in_weight, name_of, tag_of

FORMAT = 1
_SCALARS = (bool, int, float, str)
# How many differences an error names.
_SHOWN = 3

# One leaf: path, leaf (its description), kind; of an array data and sha256, of a scalar value.
Entry = dict[str, Any]


def write(found: Leaves) -> dict[str, Any]:
    """Return the manifest of these leaves, as JSON.

    Raises:
      ValueError: a 4-bit weight is incomplete, or does not fit its description.
      TypeError: a leaf that cannot be saved.
    """
    weights = find_weights(found)
    entries = {path: _entry(path, leaf) for path, leaf in found.items()}
    digests = {name_of(p): entries[p]["sha256"] for p in found if in_weight(p, weights)}
    header = {
        "format": FORMAT,
        "fingerprint": combine(digests) if digests else None,
        "leaves": list(entries.values()),
    }
    return header | {"sha256": _own_digest(header)}


def read(header: Any, where: str) -> dict[Path, Entry]:
    """Return the entries of a manifest by path.

    Raises:
      ValueError: it is not what `write` made, or has a format of the future.
    """
    if not isinstance(header, dict) or header.get("sha256") != _own_digest(header):
        raise ValueError(f"{where} is corrupted: its header is not the one saved")
    if header["format"] != FORMAT:
        raise ValueError(f"{where} has format {header['format']}, this q4jax reads {FORMAT}")
    return {
        tuple(SequenceKey(*key) if isinstance(key, list) else key for key in entry["path"]): entry
        for entry in header["leaves"]
    }


def _own_digest(header: dict[str, Any]) -> str:
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _entry(path: Path, leaf: Any) -> Entry:
    where = [[key.idx] if isinstance(key, SequenceKey) else key for key in path]
    entry: Entry = {"path": where, "leaf": describe(leaf)}
    if type(leaf) in _SCALARS:
        return entry | {"kind": "scalar", "value": leaf}
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        allowed = "an array, a PRNG key, bool, int, float or str"
        raise TypeError(f"{name_of(path)} must be {allowed}, got {type(leaf).__name__}")
    array = data_of(leaf)
    entry |= {"data": describe(array), "sha256": digest(path, array)}
    if not isinstance(leaf, jax.Array):
        return entry | {"kind": "numpy"}
    if not _is_key(leaf):
        return entry | {"kind": "jax"}
    return entry | {"kind": "key", "impl": str(jax.random.key_impl(leaf))}


def data_of(leaf: Any) -> Any:
    """Return the array that is stored for a leaf; for a typed PRNG key, its words."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def compare(entries: dict[Path, Entry], target: Leaves) -> None:
    """Raise ValueError, with both sides, where name, tag, dtype or shape of a leaf differ."""
    theirs = _table((path, entry["leaf"]) for path, entry in entries.items())
    mine = _table((path, describe(leaf)) for path, leaf in target.items())
    names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    if not names:
        return
    shown = [
        f"{name} is {mine.get(name, 'missing')} in target, "
        f"{theirs.get(name, 'missing')} in the checkpoint"
        for name in names[:_SHOWN]
    ]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    raise ValueError(f"target does not match the checkpoint: {'; '.join(shown + more)}")


def _table(leaves: Iterable[tuple[Path, str]]) -> dict[str, str]:
    """Return descriptions by name, with the tag in the description, so that both sides pair up."""
    table = {}
    for path, leaf in leaves:
        spec = tag_of(path)
        if spec is not None:
            path = (*path[:-1], split_tag(str(path[-1]))[0])
            leaf = f"{leaf} {spec.tag()}"
        table[name_of(path)] = leaf
    return table


def check(path: Path, array: Any, entry: Entry, verify: bool, where: str) -> None:
    """Raise ValueError unless `array` fits its entry, bytes included if `verify`."""
    if describe(array) != entry["data"] or (verify and digest(path, array) != entry["sha256"]):
        raise ValueError(
            f"{where} is corrupted: {name_of(path)}, {describe(array)}, is not the "
            f"{entry['data']} with sha256 {entry['sha256'][:12]}... that was saved"
        )
