"""`Quantized`, the base class of the 4-bit layers."""

from collections.abc import Mapping
from typing import Any, cast

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.core.spec import QuantSpec, float_dtype
from q4jax.nnx.variables import from_variables, to_variables
from q4jax.ops.params import Params4bit, quantize_stacked
from q4jax.ops.weight_of_stack import spec_of


class _NoStreams:
    """Takes the place of `nnx.Rngs`, which computes a key on the device when it is made."""

    def params(self) -> None:
        return None


NO_RNGS = cast(nnx.Rngs, _NoStreams())
"""The `rngs` of a layer whose initializers return arrays that exist already."""


class Quantized(nnx.Module):
    """A module with one frozen 4-bit weight, and its description of it."""

    weight: Params4bit
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    quant_type: str
    blocksize: int
    compress_statistics: bool

    def _spec(self, shape: tuple[int, int]) -> QuantSpec:
        """Return the module's description of its weight; ValueError for a setting not allowed."""
        dtype = float_dtype(self.param_dtype, "param_dtype")
        float_dtype(dtype if self.dtype is None else self.dtype)
        return QuantSpec.from_shape(
            shape, dtype, self.quant_type, self.blocksize, self.compress_statistics
        )

    def _store(self, w: Array, name: str, metadata: Mapping[str, Any]) -> None:
        """Quantize `w [*lead, out, in]` with the module's settings, and keep it."""
        weight = quantize_stacked(
            w,
            name,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
        )
        self.weight = to_variables(weight, metadata)

    def _load(self, shape: tuple[int, int]) -> Params4bit:
        """Return the weight with its arrays, checked against the module's description.

        While a scan leaves the weight in its stack, this is a `WeightOfStack`.
        """
        weight = from_variables(self.weight)
        own, found = self._spec(shape), spec_of(weight)
        if own.tag() != found.tag():
            raise ValueError(f"{type(self).__name__} is {own.tag()}, its weight is {found.tag()}")
        return weight


def to_sharding(y: Array, out_sharding: Any) -> Array:
    """Return a layer's result in the sharding that its caller asked for; None: as it is.

    Raises:
      ValueError: the sharding names axes that are not explicit, as in Flax's layers.
    """
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def other_class(expected: type, layer: Any) -> str:
    """The reason why a layer of another class than `expected`, such as a subclass, is kept."""
    cls = type(layer)
    return f"it is not an nnx.{expected.__name__} but {cls.__module__}.{cls.__qualname__}"
