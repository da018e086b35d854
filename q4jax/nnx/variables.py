"""`Frozen4bit`, the Variables in which an NNX module holds a `Params4bit`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast, overload

import jax
from flax import nnx

from q4jax.core.state import QuantState
from q4jax.ops.params import Params4bit
from q4jax.ops.weight_of_stack import WeightOfStack

nnx.register_data_type(Params4bit)
nnx.register_data_type(QuantState)
nnx.register_data_type(WeightOfStack)


class Frozen4bit(nnx.Variable[jax.Array]):
    """One array of a 4-bit weight: its codes or scales.

    It is not an `nnx.Param`, so no optimizer, gradient or weight decay over `nnx.Param` changes it.
    Its metadata `tag` names its weight: `nnx.merge` fills leaves by their order, and
    `from_variables` compares the tags.
    """


SHARDING_METADATA = ("out_sharding", "sharding_rules", "mesh")
"""The metadata of a Variable that say how it is sharded."""


def split_metadata(value: Any, metadata: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split an initializer's result into its array and its metadata, joined with `metadata`."""
    if isinstance(value, nnx.VariableMetadata):
        return value.raw_value, {**value.metadata, **metadata}
    return value, dict(metadata)


def transpose_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the metadata of a kernel `[*lead, in, out]` into that of `[*lead, out, in]`."""
    names = metadata.get("out_sharding")
    if not names:
        return dict(metadata)
    *lead, rows, columns = names
    return {**metadata, "out_sharding": (*lead, columns, rows)}


def to_variables(
    weight: Params4bit, metadata: Mapping[str, Any] = MappingProxyType({})
) -> Params4bit:
    """Wrap each array of a weight in a `Frozen4bit`.

    Args:
      weight: a weight whose arrays may be traced or abstract.
      metadata: metadata of the Variable that held the dense weight. Its `out_sharding` (partition
        names) follows the axes of `weight` and applies to codes and scales.

    Raises:
      ValueError: partition names that do not fit; see `Params4bit.partition_names`.
    """
    tag = weight.quant_state.spec.tag()
    names = metadata.get("out_sharding")
    if not names:
        return jax.tree.map(lambda array: Frozen4bit(array, tag=tag, **metadata), weight)
    leaves, tree = jax.tree.flatten(weight)
    shardings = jax.tree.leaves(
        weight.partition_names(names), is_leaf=lambda node: isinstance(node, tuple)
    )
    variables = [
        # A scalar has no axis to name, and Flax takes () for one to add an axis to.
        Frozen4bit(array, tag=tag, **{**metadata, "out_sharding": sharding or None})
        for array, sharding in zip(leaves, shardings, strict=True)
    ]
    return cast("Params4bit", jax.tree.unflatten(tree, variables))


def is_variable(node: Any) -> bool:
    """Return whether a node of a pytree is an `nnx.Variable`."""
    return isinstance(node, nnx.Variable)


@overload
def from_variables(weight: Params4bit) -> Params4bit: ...
@overload
def from_variables(weight: WeightOfStack) -> WeightOfStack: ...
def from_variables(weight: Params4bit | WeightOfStack) -> Params4bit | WeightOfStack:
    """Unwrap the arrays of a module's weight: the inverse of `to_variables`.

    Of one weight of a stack, the arrays of the stack are unwrapped.

    Raises:
      TypeError: a leaf is not a `Frozen4bit`, so that it would be trained or was replaced.
      ValueError: a leaf belongs to a weight with another description.
    """
    if isinstance(weight, WeightOfStack):
        return WeightOfStack(from_variables(weight.stack), weight.indices)
    expected = weight.quant_state.spec.tag()

    def array(variable: Any) -> Any:
        if not isinstance(variable, Frozen4bit):
            found = type(variable).__name__
            raise TypeError(
                f"a leaf of a 4-bit weight {expected} must be a Frozen4bit, got {found}"
            )
        found = variable.get_metadata("tag", None)
        if found != expected:
            raise ValueError(f"the module expects a weight {expected}, its state holds {found}")
        return variable.get_value()

    return jax.tree.map(array, weight, is_leaf=is_variable)
