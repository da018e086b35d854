"""`lay_out`: put 4-bit weights where the TPU kernels read them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format

from q4jax.core.blockwise import WeightArrays
from q4jax.core.state import with_tag
from q4jax.ops.params import Params4bit
from q4jax.pallas.tpu.placement import formats
from q4jax.tree.leaves import Path, find_weights, leaves, map_leaves


def lay_out(tree: Any) -> Any:
    """Return a tree whose 4-bit weights lie in memory as the Pallas kernels for TPUs read them.

    Shapes, values and shardings stay. It is worth it for weights whose products are by these
    kernels (`implementation="pallas"`) on a TPU; the other implementations read the default layout.

    Args:
      tree: a module, its state, or a pytree with `Params4bit`s. Its arrays may be
        `jax.ShapeDtypeStruct`s, which come back with a `jax.experimental.layout.Format`, for
        `checkpoint.restore` and to compile ahead of time.

    Returns:
      The same kind of tree, a new one. A weight that the kernels do not serve, and everything
      else, is as it was.

    Raises:
      ValueError: a 4-bit weight is incomplete, or does not fit its description.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> from q4jax.tree.lay_out import lay_out
      >>> weight = q4jax.Params4bit.quantize(jnp.ones((128, 64)), quant_type="nf4")
      >>> placed = lay_out({"kernel": weight})["kernel"]
      >>> placed.packed.shape, placed.packed.format.layout.major_to_minor
      ((128, 32), (1, 0))
    """
    where: dict[Path, Format] = {}
    for path, weight in find_weights(leaves(tree)).items():
        where |= _formats(path, weight)

    def move(path: Path, leaf: Any, _: Any) -> Any:
        if path not in where:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[path])
        return jax.device_put(leaf, where[path])

    return map_leaves(move, tree)


def _formats(path: Path, weight: Params4bit) -> dict[Path, Format]:
    """The formats of a weight's codes and scales, by path; nothing where no kernel reads it."""
    spec = weight.quant_state.spec
    if len(spec.shape) != 2 or not spec.in_rows:
        return {}
    found: Any = formats(weight.arrays, WeightArrays(*map(_sharding, weight.arrays)), spec)
    scales = (*path, "quant_state", with_tag("absmax", spec))
    return {(*path, "packed"): found.packed, scales: found.absmax}


def _sharding(array: Any) -> Any:
    default = None if array is None else jnp.zeros(()).sharding
    return getattr(array, "sharding", None) or default
