"""`QuantizedVariable`: a 4-bit weight that stands in for an `nnx.Variable` of any module."""

from typing import Any

import jax
from flax import nnx
from jax import Array

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.convert.quantized_param import QuantizedParam
from q4jax.nnx.variables import from_variables, to_variables


class Readable:
    """An object that stands in for an `nnx.Variable` and computes its array when it is read.

    `w[...]`, `w.value`, `w.get_value()`, `jnp.einsum(..., w)` and `x @ w` use the array, and the
    array's attributes (`w.T`, `w.astype`) are the object's.
    """

    def decode(self) -> Array:
        """Compute the array."""
        raise NotImplementedError

    @property
    def value(self) -> Array:
        """The array."""
        return self.decode()

    def get_value(self) -> Array:
        """The array."""
        return self.decode()

    def __getitem__(self, index: Any) -> Array:
        array = self.decode()
        return array if index is ... else array[index]

    def __jax_array__(self) -> Array:
        return self.decode()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.decode(), name)


@nnx.register_data_type
@jax.tree_util.register_pytree_with_keys_class
class QuantizedVariable(QuantizedParam, Readable):
    """A 4-bit weight that stands in for an `nnx.Variable` and is dequantized when it is read."""

    def decode(self) -> Array:
        """Return the Variable's array."""
        weight = from_variables(self.weight)
        return self.kernel_axes.from_matrices(weight.dequantize(dtype=self.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the Variable's array, without decoding it."""
        lead = from_variables(self.weight).quant_state.lead
        return (*lead[: len(lead) - len(self.kernel_axes.lead)], *self.kernel_axes.shape)


def quantize_variable(
    variable: nnx.Variable[Array], name: str, axes: KernelAxes, **settings: Any
) -> QuantizedVariable:
    """Quantize a Variable by its kernel axes; `name` is its name in errors."""
    kind = type(variable), tuple(filter(_hashable, variable.get_metadata().items()))
    param = QuantizedParam.quantize(variable[...], axes, name, variable=kind, **settings)
    return QuantizedVariable(to_variables(param.weight), axes, param.dtype, kind)


def _hashable(entry: tuple[str, Any]) -> bool:
    """Return whether metadata can be part of a treedef."""
    try:
        hash(entry)
    except TypeError:
        return False
    return True


def to_variable(quantized: QuantizedVariable) -> nnx.Variable[Array]:
    """Make the Variable again, with the dequantized weight."""
    cls, metadata = quantized.variable
    matrices = from_variables(quantized.weight).dequantize()
    variable: nnx.Variable[Array] = cls(
        quantized.kernel_axes.from_matrices(matrices), **dict(metadata)
    )
    return variable
