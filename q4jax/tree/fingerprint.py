"""`fingerprint`: a digest of the 4-bit weights of a tree."""

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from q4jax.ops.params import Params4bit
from q4jax.tree.leaves import Leaves, Path, describe, find_weights, in_weight, leaves, name_of


def fingerprint(tree: Any) -> str:
    """Compute a digest of all 4-bit weights in a tree: their descriptions and bytes.

    Two trees that hold the same matrices have the same fingerprint, whatever holds them and under
    whatever names: an NNX module, its `nnx.state`, a pytree, the files of a directory; a stack of
    layers counts as its layers do. So two weights of one description that change places do not
    show. What is not quantized (adapters, norms, optimizer states) does not count, nor do devices
    and shardings. In a multi-process program every process must call it; arrays are gathered one
    at a time.

    Args:
      tree: any of these, with arrays in it.

    Returns:
      A sha256 in hexadecimal, 64 digits. Those of q4jax 0.1 depended on names and stacking;
      `checkpoint.with_adapters` and `python -m q4jax verify --fingerprint` take them too.

    Raises:
      ValueError: there is no 4-bit weight in the tree; a weight is incomplete, or does not fit
        its description; two leaves have one name.
      TypeError: a weight is abstract or traced.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> w = jax.random.normal(jax.random.key(0), (3, 2, 64))
      >>> layers = [q4jax.Params4bit.quantize(layer, quant_type="nf4") for layer in w]
      >>> stack = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, quant_type="nf4"))(w)
      >>> q4jax.fingerprint({"step": 1, "layers": layers}) == q4jax.fingerprint({"w": stack})
      True
      >>> q4jax.fingerprint({"w": stack}) == q4jax.fingerprint(layers[:2])
      False
    """
    found, weights = _weights(tree)
    for path in found:
        if in_weight(path, weights):
            _require_values(path, found[path])
    return combine(weights.values())


def has_fingerprint(tree: Any, expected: str) -> bool:
    """Return whether a fingerprint is that of a tree, by this release's scheme or by that of 0.1.

    That of 0.1 covers the names and the stacking of weights too.

    Raises:
      ValueError: as `fingerprint`.
      TypeError: as `fingerprint`.
    """
    return expected in (fingerprint(tree), _fingerprint_0_1(tree))


def _fingerprint_0_1(tree: Any) -> str:
    """Return the fingerprint of 0.1, which its checkpoints of adapters hold."""
    found, weights = _weights(tree)
    named = {
        name_of(path): digest(path, x) for path, x in found.items() if in_weight(path, weights)
    }
    lines = (f"{name} {named[name]}\n" for name in sorted(named))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _weights(tree: Any) -> tuple[Leaves, dict[Path, Params4bit]]:
    found = leaves(tree)
    weights = find_weights(found)
    if not weights:
        raise ValueError("tree holds no 4-bit weight, so it has no fingerprint")
    return found, weights


def combine(weights: Iterable[Params4bit]) -> str:
    """Return the fingerprint of weights with values, whatever their order."""
    lines = sorted(line for weight in weights for line in _matrices(weight))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _matrices(weight: Params4bit) -> Iterable[str]:
    """Yield a line for each matrix of a weight: its description and the sha256 of its arrays."""
    try:
        weight = jax.tree.map(_on_host, weight).unstack()
    except ValueError:  # matrices that share scales are one
        weight = jax.tree.map(_on_host, weight)
    state = weight.quant_state
    arrays = [np.asarray(array) for array in weight.arrays if array is not None]
    stacked = state.lead if state.offset is None else state.offset.shape
    for index in itertools.product(*map(range, stacked)):
        sha = hashlib.sha256()
        for array in arrays:
            sha.update(describe(array[index]).encode())
            sha.update(_bytes(array[index]))
        yield f"{state.spec.tag()} {sha.hexdigest()}\n"


def digest(path: Path, leaf: Any) -> str:
    """Compute the sha256 of an array's dtype, shape and bytes, in hexadecimal."""
    _require_values(path, leaf)
    leaf = _on_host(leaf)
    sha = hashlib.sha256(describe(leaf).encode())
    sha.update(_bytes(leaf))
    return sha.hexdigest()


def _require_values(path: Path, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"{name_of(path)} must be an array with values, got {type(leaf).__name__}")


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
