"""How an NNX module holds a `Params4bit`: as a pytree of frozen Variables that know their tag."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import jax
from flax import nnx

from q4jax.core.state import QuantState
from q4jax.ops.params import Params4bit

nnx.register_data_type(Params4bit)
nnx.register_data_type(QuantState)


class Frozen4bit(nnx.Variable[jax.Array]):
    """One array of a 4-bit weight: codes or scales.

    Not an `nnx.Param`, so that no optimizer, gradient or weight decay over `nnx.Param` meets it.
    Its metadata `tag` says which weight it belongs to: `nnx.merge` fills leaves by their order,
    and `thaw` compares.
    """


PLACING = ("out_sharding", "sharding_rules", "mesh")
"""The metadata of a Variable that say where it lies."""


def apart(value: Any, metadata: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What an initializer returned: its array, and `metadata` with what it added to it."""
    if isinstance(value, nnx.VariableMetadata):
        return value.raw_value, {**value.metadata, **metadata}
    return value, dict(metadata)


def transposed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a kernel `[*lead, in, out]`, for `[*lead, out, in]`."""
    names = metadata.get("out_sharding")
    if not names:
        return dict(metadata)
    *lead, rows, columns = names
    return {**metadata, "out_sharding": (*lead, columns, rows)}


def freeze(weight: Params4bit, metadata: Mapping[str, Any] = MappingProxyType({})) -> Params4bit:
    """The weight with a `Frozen4bit` in the place of each array.

    Args:
      weight: its arrays may be traced or abstract.
      metadata: of the Variable that held the weight before it was quantized, its `out_sharding`
        (partition names) in the order of the axes of `weight`; codes and scales have it alike.

    Raises:
      ValueError: partition names that do not fit; see `Params4bit.partition_names`.
    """
    tag = weight.quant_state.spec.tag()
    names = metadata.get("out_sharding")
    if not names:
        return jax.tree.map(lambda array: Frozen4bit(array, tag=tag, **metadata), weight)
    leaves, tree = jax.tree.flatten(weight)
    places = jax.tree.leaves(
        weight.partition_names(names), is_leaf=lambda node: isinstance(node, tuple)
    )
    variables = [
        # A scalar has no axis to name, and Flax takes () for one to add an axis to.
        Frozen4bit(array, tag=tag, **{**metadata, "out_sharding": place or None})
        for array, place in zip(leaves, places, strict=True)
    ]
    return cast("Params4bit", jax.tree.unflatten(tree, variables))


def is_variable(node: Any) -> bool:
    """Whether a node of a pytree is a Variable of any kind."""
    return isinstance(node, nnx.Variable)


def thaw(weight: Params4bit) -> Params4bit:
    """The weight with its arrays, out of a module.

    Raises:
      TypeError: a leaf is no `Frozen4bit`: it would be trained, or was replaced.
      ValueError: a leaf belongs to a weight of another description.
    """
    expected = weight.quant_state.spec.tag()

    def array(variable: Any) -> Any:
        if not isinstance(variable, Frozen4bit):
            kind = type(variable).__name__
            raise TypeError(f"a leaf of a 4-bit weight {expected} must be a Frozen4bit, got {kind}")
        found = variable.get_metadata("tag", None)
        if found != expected:
            raise ValueError(f"the module expects a weight {expected}, its state holds {found}")
        return variable.get_value()

    return jax.tree.map(array, weight, is_leaf=is_variable)
