"""How an NNX module holds a `Params4bit`: as a pytree of frozen Variables that know their tag."""

from typing import Any

import jax
from flax import nnx

from q4jax.params import Params4bit
from q4jax.state import QuantState

nnx.register_data_type(Params4bit)
nnx.register_data_type(QuantState)


class Frozen4bit(nnx.Variable[jax.Array]):
    """One array of a 4-bit weight: codes or scales.

    Not an `nnx.Param`, so that no optimizer, gradient or weight decay over `nnx.Param` meets it.
    Its metadata `tag` says which weight it belongs to: `nnx.merge` fills leaves by their order,
    and `thaw` compares.
    """


def freeze(weight: Params4bit) -> Params4bit:
    """The weight with a `Frozen4bit` in the place of each array."""
    tag = weight.quant_state.spec.tag()
    return jax.tree.map(lambda array: Frozen4bit(array, tag=tag), weight)


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
