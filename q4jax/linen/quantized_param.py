"""`QuantizedBox`: a 4-bit weight that stands in for a parameter of a Linen model."""

from typing import Any

import jax
from flax import serialization
from flax.core import meta
from jax import Array

from q4jax.convert.quantized_param import QuantizedParam


@jax.tree_util.register_pytree_with_keys_class
class QuantizedBox(QuantizedParam, meta.AxisMetadata[Array]):
    """A 4-bit weight that stands in for a Linen parameter; Linen opens the box when it reads it."""

    def unbox(self) -> Array:
        """Return the parameter's array."""
        return self.decode()

    def replace_boxed(self, val: Any) -> Any:
        """Return `val`, which replaces the weight."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "QuantizedBox":
        """Return the box: its arrays have the axis already."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "QuantizedBox":
        """Return the box: its arrays have lost the axis already."""
        return self


def _fill(box: QuantizedBox, state: Any) -> QuantizedBox:
    weight = serialization.from_state_dict(box.weight, state)
    return QuantizedBox(weight, box.kernel_axes, box.dtype, box.variable)


serialization.register_serialization_state(
    QuantizedBox, lambda box: serialization.to_state_dict(box.weight), _fill
)
