"""`fingerprint`: a digest of the 4-bit weights of a tree."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from q4jax.tree.leaves import Path, describe, find_weights, in_weight, leaves, name_of


def fingerprint(tree: Any) -> str:
    """Compute a digest of all 4-bit weights in a tree: names, dtypes, shapes and bytes.

    Two trees that hold the same weights under the same names have the same fingerprint, whatever
    holds them: an NNX module, its `nnx.state`, the pure dict of that, or a pytree. What is not
    quantized (adapters, norms, optimizer states) does not count, nor do devices and shardings.
    In a multi-process program every process must call it; arrays are gathered one at a time.

    Args:
      tree: any of these, with arrays in it.

    Returns:
      A sha256 in hexadecimal, 64 digits.

    Raises:
      ValueError: there is no 4-bit weight in the tree; a weight is incomplete, or does not fit
        its description; two leaves have one name.
      TypeError: a weight is abstract or traced.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="nf4")
      >>> before = q4jax.fingerprint({"step": 1, "layers": [weight]})
      >>> before == q4jax.fingerprint({"step": 2, "layers": {0: weight}})
      True
      >>> weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="fp4")
      >>> before == q4jax.fingerprint({"step": 1, "layers": [weight]})
      False
    """
    found = leaves(tree)
    weights = find_weights(found)
    if not weights:
        raise ValueError("tree holds no 4-bit weight, so it has no fingerprint")
    paths = sorted((path for path in found if in_weight(path, weights)), key=name_of)
    return combine({name_of(path): digest(path, found[path]) for path in paths})


def combine(digests: dict[str, str]) -> str:
    """Combine named digests to one, whatever their order."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(path: Path, leaf: Any) -> str:
    """Compute the sha256 of an array's dtype, shape and bytes, in hexadecimal."""
    if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"{name_of(path)} must be an array with values, got {type(leaf).__name__}")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    sha = hashlib.sha256(describe(leaf).encode())
    sha.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
