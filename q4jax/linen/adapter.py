"""LoRA adapters of Linen's 4-bit weights: `LoRAFactors`, and the weight that has one."""

import math
from collections.abc import Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import serialization
from flax.core import meta
from jax import Array

from q4jax.linen.quantized_param import QuantizedBox

ADAPTERS = "lora"
"""The collection of the adapters."""


@jax.tree_util.register_pytree_with_keys_class
class LoRAFactors:
    """A low-rank update of a weight: `lora_a @ lora_b * scale`, `[*lead, in, out]`.

    Args:
      lora_a: `[*lead, in, rank]`.
      lora_b: `[*lead, rank, out]`.
      alpha: numerator of the scale.
      rslora: whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
    """

    def __init__(self, lora_a: Array, lora_b: Array, alpha: float, rslora: bool = False):
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.alpha = alpha
        self.rslora = rslora

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Return the matrices with their keys, for jax."""
        names = "lora_a", "lora_b"
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names]
        return keyed, (self.alpha, self.rslora)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Iterable[Any]) -> Self:
        """Invert `tree_flatten_with_keys`, for jax; leaves may be anything."""
        return cls(*leaves, *static)

    @property
    def rank(self) -> int:
        """The inner width."""
        return int(self.lora_a.shape[-1])

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Array:
        """Return the update of the matrices of a 4-bit weight, float32 `[*lead, out, in]`."""
        low, high = (m.astype(jnp.float32) for m in (self.lora_a, self.lora_b))
        product = jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST)
        return jnp.swapaxes(product * jnp.float32(self.scale), -1, -2)

    def apply(self, x: Array) -> Array:
        """Map `[..., in]` to `[..., out]`, in the dtype of `x`."""
        low, high = (m.astype(x.dtype) for m in (self.lora_a, self.lora_b))
        return (x @ low) @ high * jnp.asarray(self.scale, x.dtype)

    def __repr__(self) -> str:
        shapes = [getattr(m, "shape", m) for m in (self.lora_a, self.lora_b)]
        return f"{type(self).__name__}({shapes[0]}, {shapes[1]}, alpha={self.alpha})"


@jax.tree_util.register_pytree_with_keys_class
class AdaptedBox(meta.AxisMetadata[Array]):
    """A 4-bit weight and its adapter; Linen opens the box to their sum.

    Args:
      base: the weight.
      factors: the adapter.
    """

    def __init__(self, base: QuantizedBox, factors: LoRAFactors):
        self.base = base
        self.factors = factors

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """Return the weight and the adapter with their keys, for jax."""
        names = "base", "factors"
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Iterable[Any]) -> Self:
        """Invert `tree_flatten_with_keys`, for jax; leaves may be anything."""
        return cls(*leaves)

    def unbox(self) -> Array:
        """Return the parameter's array, the weight plus the update."""
        array = self.base.unbox()
        return array + self.base.kernel_axes.from_matrices(self.factors.delta()).astype(array.dtype)

    def replace_boxed(self, val: Any) -> Any:
        """Return `val`, which replaces the weight."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> "AdaptedBox":
        """Return the box: its arrays have the axis already."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "AdaptedBox":
        """Return the box: its arrays have lost the axis already."""
        return self


def _state(factors: LoRAFactors) -> dict[str, Any]:
    return {"lora_a": factors.lora_a, "lora_b": factors.lora_b}


def _fill(factors: LoRAFactors, state: Any) -> LoRAFactors:
    found = serialization.from_state_dict(_state(factors), state)
    return LoRAFactors(found["lora_a"], found["lora_b"], factors.alpha, factors.rslora)


serialization.register_serialization_state(LoRAFactors, _state, _fill)
