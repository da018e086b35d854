"""`check_sharding`: find 4-bit weights whose sharding cannot work."""

from typing import Any

from jax.sharding import NamedSharding

from q4jax.ops.params import Params4bit
from q4jax.ops.weight_sharding import WeightAxes
from q4jax.sharding.axes import ShardedOperand, mesh_axes_of
from q4jax.sharding.strategy import check_weight
from q4jax.tree.leaves import find_weights, leaves, name_of


def check_sharding(tree: Any) -> None:
    """Check the sharding of each 4-bit weight before a program is compiled.

    Args:
      tree: a module, its state, or a pytree; its arrays may be `jax.ShapeDtypeStruct`s with a
        sharding. Arrays without a `NamedSharding` are passed over.

    Raises:
      ValueError: codes and scales of a weight are split differently, or over axes that would split
        a block. The message names the layer, the mesh axes and the sizes.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> q4jax.check_sharding({"layer": q4jax.Params4bit.quantize(jnp.ones((2, 64)))})
    """
    for path, weight in find_weights(leaves(tree)).items():
        _check(name_of(path), weight)


def _check(name: str, weight: Params4bit) -> None:
    state = weight.quant_state
    arrays = (weight.packed, state.absmax)
    found = [getattr(array, "sharding", None) for array in arrays]
    shardings = [sharding for sharding in found if isinstance(sharding, NamedSharding)]
    if len(shardings) < len(arrays):
        return
    packed, absmax = shardings
    if packed.mesh != absmax.mesh:
        raise ValueError(f"{name}: its codes and its scales are on different meshes")
    sizes = dict(packed.mesh.shape)
    axes = WeightAxes.from_spec(state.spec, len(state.lead), nested=state.spec.nested)
    operands = [
        ShardedOperand(labels, tuple(array.shape), mesh_axes_of(sharding.spec, array.ndim, sizes))
        for labels, array, sharding in zip(
            (axes.packed, axes.absmax), arrays, shardings, strict=True
        )
    ]
    check_weight(f"{name} ({state.spec.tag()})", operands, sizes)
