"""The manifest of a checkpoint: dtype, shape and sha256 of every leaf, and checks against it."""

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import SequenceKey

from q4jax.checkpoint.entries import (
    SCALARS,
    SHA256,
    Entry,
    array_of,
    check_entry,
    check_paths,
    one_line,
    read_path,
    shown,
)
from q4jax.core.state import split_tag
from q4jax.tree.fingerprint import combine, digest
from q4jax.tree.leaves import Leaves, Path, describe, find_weights, name_of, tag_of

FORMAT = 1
_HEADER = {"format", "fingerprint", "leaves", "sha256"}
_logger = logging.getLogger("q4jax")
# How many differences an error names.
_SHOWN = 3


def write(found: Leaves) -> dict[str, Any]:
    """Return the manifest of these leaves, as JSON.

    Raises:
      ValueError: a 4-bit weight is incomplete, or does not fit its description.
      TypeError: a leaf that cannot be saved.
    """
    weights = find_weights(found)
    check_paths(found)
    entries = {path: _entry(path, leaf) for path, leaf in found.items()}
    header = {
        "format": FORMAT,
        "fingerprint": combine(weights.values()) if weights else None,
        "leaves": list(entries.values()),
    }
    return header | {"sha256": _own_digest(header)}


def read(header: Any, where: str) -> dict[Path, Entry]:
    """Return the entries of a manifest by path.

    Raises:
      ValueError: it is not what `write` made, or has a format of the future.
    """
    made_by = header.get("format") if isinstance(header, dict) else None
    if type(made_by) is int and made_by > FORMAT:
        raise ValueError(f"{where} has format {made_by}, this q4jax reads {FORMAT}")
    try:
        if made_by is None or header.get("sha256") != _own_digest(header):
            raise ValueError("its header is not the one saved")
        return _read(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is corrupted: {one_line(error)}") from None


def _read(header: dict[str, Any]) -> dict[Path, Entry]:
    of_format = type(header["format"]) is int and header["format"] == FORMAT
    if header.keys() != _HEADER or not of_format:
        raise ValueError(f"its header must have {', '.join(sorted(_HEADER))} of format {FORMAT}")
    fingerprint, listed = header["fingerprint"], header["leaves"]
    if fingerprint is not None and not (
        isinstance(fingerprint, str) and SHA256.fullmatch(fingerprint)
    ):
        raise ValueError(f"fingerprint must be 64 digits, got {shown(fingerprint)}")
    if not isinstance(listed, list):
        raise ValueError(f"leaves must be a list, got {shown(listed)}")
    entries: dict[Path, Entry] = {}
    for number, entry in enumerate(listed):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"must be an object, got {shown(entry)}")
            path = read_path(entry.get("path"))
            check_entry(entry)
        except ValueError as error:
            raise ValueError(f"entry {number} of its header: {error}") from None
        if path in entries:
            raise ValueError(f"two leaves are named {shown(name_of(path))}")
        entries[path] = entry
    if not any("data" in entry for entry in entries.values()):
        raise ValueError("its header lists no array")
    check_paths(entries)
    find_weights(
        {p: array_of(e["data"]) if "data" in e else e["value"] for p, e in entries.items()}
    )
    return entries


def _own_digest(header: dict[str, Any]) -> str:
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _entry(path: Path, leaf: Any) -> Entry:
    where = [[key.idx] if isinstance(key, SequenceKey) else key for key in path]
    entry: Entry = {"path": where, "leaf": describe(leaf)}
    if type(leaf) in SCALARS:
        try:
            json.dumps(leaf)
        except ValueError as error:  # an int of more digits than Python turns into text
            raise ValueError(f"{name_of(path)} cannot be saved: {error}") from None
        return entry | {"kind": "scalar", "value": leaf}
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        allowed = "an array, a PRNG key, bool, int, float or str"
        raise TypeError(f"{name_of(path)} must be {allowed}, got {type(leaf).__name__}")
    array = data_of(leaf)
    try:
        array_of(describe(array))
    except ValueError as error:
        raise TypeError(f"{name_of(path)} cannot be saved: {error}") from None
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


def compare(
    entries: dict[Path, Entry], target: Leaves, partial: bool, where: str
) -> dict[Path, Entry]:
    """Return the entries of the target's leaves.

    Args:
      entries: of the whole checkpoint.
      target: the leaves to restore.
      partial: whether the checkpoint may have others, which are then named in the log.
      where: what the log calls the checkpoint.

    Raises:
      ValueError: name, tag, dtype or shape of a leaf differ; both sides are named.
    """
    theirs = _table((path, entry["leaf"]) for path, entry in entries.items())
    mine = _table((path, describe(leaf)) for path, leaf in target.items())
    absent = [path for path in entries if _untagged(path) not in mine]
    left_out = {_untagged(path) for path in absent} if partial else set()
    names = [n for n in mine | theirs if mine.get(n) != theirs.get(n) and n not in left_out]
    if names:
        shown = [
            f"{name} is {mine.get(name, 'missing')} in target, "
            f"{theirs.get(name, 'missing')} in the checkpoint"
            for name in names[:_SHOWN]
        ]
        more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
        hint = " (partial=True restores the target alone)" if len(names) == len(absent) else ""
        raise ValueError(f"target does not match the checkpoint: {'; '.join(shown + more)}{hint}")
    for part in _parts(absent, target):
        _logger.info("not restored from %s: %s", where, part)
    return {path: entry for path, entry in entries.items() if _untagged(path) in mine}


def _parts(absent: list[Path], present: Iterable[Path]) -> list[str]:
    """Return the names of the largest subtrees that hold absent leaves only."""
    kept = {name_of(path[:end]) for path in present for end in range(len(path) + 1)}
    ends = (
        next(end for end in range(len(path) + 1) if name_of(path[:end]) not in kept)
        for path in absent
    )
    return list(dict.fromkeys(name_of(p[:end]) for p, end in zip(absent, ends, strict=True)))


def _table(leaves: Iterable[tuple[Path, str]]) -> dict[str, str]:
    """Return descriptions by name, with the tag in the description, so that both sides pair up."""
    table = {}
    for path, leaf in leaves:
        spec = tag_of(path)
        table[_untagged(path)] = leaf if spec is None else f"{leaf} {spec.tag()}"
    return table


def _untagged(path: Path) -> str:
    if tag_of(path) is not None:
        path = (*path[:-1], split_tag(str(path[-1]))[0])
    return name_of(path)


def check(path: Path, array: Any, entry: Entry, verify: bool, where: str) -> None:
    """Raise ValueError unless `array` fits its entry, bytes included if `verify`."""
    if describe(array) != entry["data"] or (verify and digest(path, array) != entry["sha256"]):
        raise ValueError(
            f"{where} is corrupted: {name_of(path)}, {describe(array)}, is not the "
            f"{entry['data']} with sha256 {entry['sha256'][:12]}... that was saved"
        )
