"""The table of layer classes: how each becomes 4-bit, back, and what an adapter needs to know.

To add a layer class, write the class and register one `LayerConverter` for it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax import Array

from q4jax.convert.einsum import Product
from q4jax.convert.kernel_axes import KernelAxes
from q4jax.convert.plan import Conversion
from q4jax.convert.registry import describe_layer
from q4jax.nnx import einsum, embedding, linear
from q4jax.nnx.matrix_layer import einsum_of, kernel_axes
from q4jax.nnx.quantized_variable import QuantizedVariable, quantize_variable, to_variable


def _matmul(layer: Any, x: Array, product: Product, einsum_str: str | None = None) -> Array:
    return product(x)


@dataclasses.dataclass(frozen=True)
class LayerConverter:
    """The entry of one layer class.

    Attributes:
      dense: the dense class.
      quantized: the 4-bit class; None where there is none.
      unsupported_reason: a function from a dense layer to the reason why it cannot become 4-bit, or
        None.
      to_4bit: a function from (dense layer, name=, quant_type=, blocksize=, compress_statistics=,
        dtype=) to the 4-bit layer.
      to_dense: a function from a 4-bit layer to the dense one.
      weight: the name of the dense layer's weight. The 4-bit layer's is "weight".
      kernel_axes: a function from either layer to the axes of its weight.
      apply: a function from (either layer, x, product, einsum_str) to the layer's output without
        bias, where `product` multiplies rows `[*batch, rows, in]` by matrices and `einsum_str` is
        the equation of the call, or None.
      is_embedding: whether the layer looks up rows of its weight.
      torch_names: name of a dense parameter -> its name in a torch state dict.
    """

    dense: type
    quantized: type | None = None
    unsupported_reason: Callable[[Any], str | None] = lambda _: None
    to_4bit: Callable[..., nnx.Module] | None = None
    to_dense: Callable[[Any], nnx.Module] | None = None
    weight: str = "kernel"
    kernel_axes: Callable[[Any], KernelAxes] | None = None
    apply: Callable[..., Array] = _matmul
    is_embedding: bool = False
    torch_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def quantize(self, module: Any, path: str, settings: dict[str, Any]) -> nnx.Module:
        """Make the 4-bit layer of the dense layer at a path."""
        assert self.to_4bit is not None
        return self.to_4bit(module, name=f"{path}.{self.weight}".removeprefix("."), **settings)

    def is_4bit(self, module: Any) -> bool:
        """Return whether the module is the 4-bit layer of the two."""
        return self.quantized is not None and isinstance(module, self.quantized)

    def names_in_torch(self, module: Any) -> dict[str, str]:
        """Return the name in a torch state dict of each parameter of a layer, by its own name."""
        renamed = {self.weight: "weight"} if self.is_4bit(module) else {}
        return {renamed.get(name, name): torch for name, torch in self.torch_names.items()}


_CONVERTERS: dict[type, LayerConverter] = {}


def register_converter(converter: LayerConverter) -> None:
    """Add a layer class to the table, or replace its entry."""
    for cls in filter(None, (converter.dense, converter.quantized)):
        _CONVERTERS[cls] = converter


def converter_for(module: Any) -> LayerConverter | None:
    """Return the entry of the class of a module, dense or 4-bit, or of its nearest base class."""
    return next((_CONVERTERS[cls] for cls in type(module).__mro__ if cls in _CONVERTERS), None)


def registered_axes(module: Any) -> dict[str, KernelAxes]:
    """Return the dense weights of a module whose class `register_layer` knows, by name."""
    axes = describe_layer(module, _shapes(module))
    return {} if axes is None or isinstance(axes, str) else axes


def quantized_variables(module: Any) -> dict[str, QuantizedVariable]:
    """Return the 4-bit weights that stand in for Variables of a module, by name."""
    return {n: v for n, v in vars(module).items() if isinstance(v, QuantizedVariable)}


def conversion_of(module: Any) -> Conversion | None:
    """Return how `quantize_model` treats a module; None where it has no weight."""
    axes = describe_layer(module, _shapes(module))
    if axes is not None:
        return Conversion(axes) if isinstance(axes, str) else Conversion(None, _in_place(axes))
    converter = converter_for(module)
    if converter is None:
        weights = [name for name, shape in _shapes(module).items() if len(shape) > 1]
        unknown = f"its class is unknown; register_layer for its {weights}"
        return Conversion(unknown) if weights else None
    reason = converter.unsupported_reason(module)
    if converter.to_4bit is None:
        return None if reason is None else Conversion(reason)
    return Conversion(reason, converter.quantize, converter.is_embedding)


def _in_place(axes: dict[str, KernelAxes]) -> Callable[[Any, str, dict[str, Any]], nnx.Module]:
    def quantize(module: Any, path: str, settings: dict[str, Any]) -> nnx.Module:
        for name, of_weight in axes.items():
            where = f"{path}.{name}".removeprefix(".")
            variable = getattr(module, name)
            setattr(module, name, quantize_variable(variable, where, of_weight, **settings))
        return module

    return quantize


def is_quantized(module: Any) -> bool:
    """Return whether a module holds 4-bit weights."""
    converter = converter_for(module)
    return bool(converter and converter.is_4bit(module)) or bool(quantized_variables(module))


def to_dense(module: Any) -> nnx.Module | None:
    """Return the dense layer of a 4-bit one; None where the module is not 4-bit.

    A module of a registered class is changed in place.
    """
    converter = converter_for(module)
    if converter and converter.is_4bit(module) and converter.to_dense:
        return converter.to_dense(module)
    quantized = quantized_variables(module)
    for name, weight in quantized.items():
        setattr(module, name, to_variable(weight))
    return module if quantized else None


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(v.shape) for n, v in vars(module).items() if isinstance(v, nnx.Param)}


def _einsum(layer: Any, x: Array, product: Product, einsum_str: str | None = None) -> Array:
    return einsum_of(layer, x.ndim, einsum_str).apply(x, product, kernel_axes(layer))


def _linear_axes(layer: Any) -> KernelAxes:
    return KernelAxes((layer.in_features, layer.out_features), in_axes=(0,))


_SCALE_AND_BIAS = {"scale": "weight", "bias": "bias"}
for _converter in (
    LayerConverter(
        nnx.Linear,
        linear.Linear4bit,
        linear.unsupported_reason,
        linear.Linear4bit.from_linear,
        linear.to_linear,
        kernel_axes=_linear_axes,
        torch_names={"kernel": "weight", "bias": "bias"},
    ),
    LayerConverter(
        nnx.LinearGeneral,
        einsum.LinearGeneral4bit,
        einsum.linear_general_reason,
        einsum.LinearGeneral4bit.from_linear_general,
        einsum.to_linear_general,
        kernel_axes=kernel_axes,
        apply=_einsum,
    ),
    LayerConverter(
        nnx.Einsum,
        einsum.Einsum4bit,
        einsum.einsum_reason,
        einsum.Einsum4bit.from_einsum,
        einsum.to_einsum,
        kernel_axes=kernel_axes,
        apply=_einsum,
    ),
    LayerConverter(
        nnx.Embed,
        embedding.Embedding4bit,
        embedding.unsupported_reason,
        embedding.from_embed,
        embedding.to_embed,
        weight="embedding",
        is_embedding=True,
        torch_names={"embedding": "weight"},
    ),
    LayerConverter(nnx.Conv, unsupported_reason=lambda _: "a convolution"),
    LayerConverter(nnx.ConvTranspose, unsupported_reason=lambda _: "a convolution"),
    # They have no matrix, though their vectors have two axes where layers are stacked.
    LayerConverter(nnx.LayerNorm, torch_names=_SCALE_AND_BIAS),
    LayerConverter(nnx.RMSNorm, torch_names={"scale": "weight"}),
    LayerConverter(nnx.BatchNorm),
    LayerConverter(nnx.GroupNorm),
):
    register_converter(_converter)
