"""Where `add_lora` finds its targets: the layers of a model that can have an adapter."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.lora.adapter import LoRAEmbedding4bit, LoRALinear4bit
from q4jax.lora.weight import LoRAWeight
from q4jax.nnx.converters import converter_for, quantized_variables, registered_axes


@dataclasses.dataclass(frozen=True)
class Target:
    """A layer that can have an adapter.

    Attributes:
      adapt: a function from (module, path, settings of the adapter) to the adapted module.
      is_4bit: whether its weight is 4-bit.
      is_embedding: whether it is an embedding.
      weights: the axes of the weights that get adapters of their own, by name; empty: the layer
        gets one.
    """

    adapt: Callable[[Any, str, dict[str, Any]], nnx.Module]
    is_4bit: bool
    is_embedding: bool = False
    weights: Mapping[str, KernelAxes] = dataclasses.field(default_factory=dict)

    def only(self, name: str) -> "Target":
        """Return the target of one of its weights."""
        axes = {name: self.weights[name]}
        return dataclasses.replace(self, adapt=_adapt_weights(axes), weights=axes)


def target_of(module: Any) -> Target | None:
    """Return how an adapter is added to a module; None where it cannot be."""
    quantized = {n: v.kernel_axes for n, v in quantized_variables(module).items()}
    # A class may name matrices that can have adapters and never become 4-bit.
    axes = quantized or registered_axes(module) or getattr(module, "adapter_axes", None)
    if axes:
        return Target(_adapt_weights(axes), bool(quantized), weights=axes)
    converter = converter_for(module)
    if converter is None or converter.to_4bit is None:
        return None
    is_4bit = converter.is_4bit(module)
    if not is_4bit and converter.unsupported_reason(module) is not None:
        return None
    adapt = _adapt_embedding if converter.is_embedding else LoRALinear4bit
    return Target(_with(adapt), is_4bit, converter.is_embedding)


def _with(adapter: Callable[..., nnx.Module]) -> Callable[[Any, str, dict[str, Any]], nnx.Module]:
    return lambda module, _, settings: adapter(module, **settings)


def _adapt_embedding(module: Any, **settings: Any) -> nnx.Module:
    return LoRAEmbedding4bit(module, **{**settings, "dropout": 0.0})


def _adapt_weights(
    axes: dict[str, KernelAxes],
) -> Callable[[Any, str, dict[str, Any]], nnx.Module]:
    def adapt(module: Any, path: str, settings: dict[str, Any]) -> nnx.Module:
        if settings["dropout"]:
            raise NotImplementedError(
                f"dropout at {path}: a {type(module).__name__} has an adapter of its weight alone, "
                f"and its input is not seen; give it dropout=0"
            )
        for name, of_weight in axes.items():
            setattr(module, name, LoRAWeight(getattr(module, name), of_weight, **settings))
        return module

    return adapt
