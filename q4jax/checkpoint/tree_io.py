"""Turn a tree into named arrays and a manifest, and back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from q4jax.checkpoint import manifest
from q4jax.checkpoint.entries import Entry, array_of, one_line
from q4jax.tree.leaves import (
    Leaves,
    Path,
    find_weights,
    in_weight,
    leaves,
    map_leaves,
    name_of,
    nest,
)

ArrayTarget = jax.ShapeDtypeStruct | np.ndarray
"""The array to restore: on devices, with a sharding, or in numpy."""
ArrayTargets = dict[str, ArrayTarget]


def take_apart(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of a tree by name, and its manifest.

    Raises:
      ValueError: a 4-bit weight is incomplete, or does not fit its description; two leaves have
        one name; there is no array.
      TypeError: a leaf that cannot be saved.
    """
    found = leaves(tree)
    signed = manifest.write(found)
    arrays = {name_of(p): manifest.data_of(leaf) for p, leaf in found.items() if _is_array(leaf)}
    if not arrays:
        raise ValueError("tree holds no array to save")
    return arrays, signed


def rebuild(
    signed: Any,
    read_arrays: Callable[[ArrayTargets], dict[str, Any]],
    where: str,
    target: Any,
    verify: bool,
    partial: bool,
) -> Any:
    """Read the manifest, compare the target, read and verify the arrays, and rebuild the tree.

    Args:
      signed: the header, as it was read.
      read_arrays: reads the arrays of these names, given where each goes.
      where: what errors call the checkpoint.
      target: the tree to fill, or None: nested dicts and lists.
      verify: compare the sha256 of every array.
      partial: whether the target may leave out parts of the checkpoint.
    """
    if partial and target is None:
        raise ValueError("partial=True needs a target, which says what to restore; got None")
    entries = manifest.read(signed, where)
    wanted: dict[str, Any] = {}
    if target is not None:
        found = leaves(target)
        entries = manifest.compare(entries, found, partial, where)
        wanted = {name_of(path): leaf for path, leaf in found.items()}
    stored = {name_of(path): path for path, entry in entries.items() if "data" in entry}
    targets = {
        name: _array_target(name, entries[at], wanted.get(name)) for name, at in stored.items()
    }
    read = _read(read_arrays, targets, where) if targets else {}
    arrays: Leaves = {path: read[name] for name, path in stored.items()}
    for path, array in arrays.items():
        manifest.check(path, array, entries[path], verify, where)
    values: dict[Path, Any] = {
        path: _value(entry, arrays.get(path), wanted.get(name_of(path)))
        for path, entry in entries.items()
    }
    if target is not None:
        named = {name_of(path): value for path, value in values.items()}
        return map_leaves(lambda path, leaf, _: named[name_of(path)], target)
    weights = find_weights(values)
    return nest({p: x for p, x in values.items() if not in_weight(p, weights)} | weights)


def _read(
    read_arrays: Callable[[ArrayTargets], dict[str, Any]], targets: ArrayTargets, where: str
) -> dict[str, Any]:
    """Read arrays; ValueError if the files that hold them are not those that were written."""
    try:
        read = read_arrays(targets)
        missing = sorted(targets.keys() - read.keys())
        if missing:
            raise ValueError(f"there is no {missing[0]}")
    # Orbax and TensorStore raise a plain Exception, KeyError, ValueError and more for such files.
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise ValueError(
            f"{where} is corrupted or incomplete: its arrays cannot be read: {one_line(error)}"
        ) from None
    return read


def _array_target(name: str, entry: Entry, wanted: Any) -> ArrayTarget:
    stored = array_of(entry["data"])
    dtype, shape = stored.dtype, stored.shape
    if isinstance(wanted, np.ndarray | np.generic) or (wanted is None and entry["kind"] == "numpy"):
        return np.broadcast_to(np.zeros((), dtype), shape)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} is {entry['data']}, which JAX holds with jax_enable_x64 only")
    where = _placed(wanted) if entry["kind"] != "key" else None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where or jnp.zeros(()).sharding)


def _placed(wanted: Any) -> Any:
    """Return the sharding of an array; its format where its layout is not the default one."""
    found = getattr(wanted, "format", None)
    order = getattr(getattr(found, "layout", None), "major_to_minor", None)
    if order is not None and order != tuple(range(len(order))):
        return found
    return getattr(wanted, "sharding", None)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype")


def _value(entry: Entry, array: Any, wanted: Any) -> Any:
    if entry["kind"] == "key":
        key = jax.random.wrap_key_data(array, impl=entry["impl"])
        return jax.device_put(key, getattr(wanted, "sharding", None))
    return array if "data" in entry else entry["value"]
