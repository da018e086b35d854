"""The classes of layers that `quantize_model` knows: how each becomes 4-bit, and back."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array

from q4jax.convert.plan import Kind
from q4jax.convert.registry import describe_layer
from q4jax.nnx.einsum import Einsum4bit, LinearGeneral4bit, why_not_einsum, why_not_general
from q4jax.nnx.linear import Embedding4bit, Linear4bit, other_class, why_not
from q4jax.nnx.quantized_variable import ForeignWeight, host, restore
from q4jax.nnx.variables import thaw
from q4jax.ops.params import Params4bit

QUANTIZED = (Linear4bit, LinearGeneral4bit, Einsum4bit, Embedding4bit)
# Vectors beside the weights, which have two axes where layers are stacked.
_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm)


def foreign_folds(module: Any) -> dict[str, Any]:
    """The dense weights of a module of a registered class, by name; empty for any other."""
    folds = describe_layer(module, _shapes(module))
    return {} if folds is None or isinstance(folds, str) else folds


def kind_of(module: Any) -> Kind | None:
    """What a module is to `quantize_model`; None where it has no weight."""
    folds = describe_layer(module, _shapes(module))
    if folds is not None:
        return Kind(folds) if isinstance(folds, str) else Kind(None, _host(folds))
    if isinstance(module, nnx.Linear):
        return Kind(why_not(module), _by(Linear4bit.from_linear, "kernel"))
    if isinstance(module, nnx.LinearGeneral):
        return Kind(why_not_general(module), _by(LinearGeneral4bit, "kernel"))
    if isinstance(module, nnx.Einsum):
        return Kind(why_not_einsum(module), _by(Einsum4bit, "kernel"))
    if isinstance(module, nnx.Embed):
        return Kind(_why_not_embed(module), _by(_embedding, "embedding"), embedding=True)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        return Kind("a convolution")
    weights = [name for name, shape in _shapes(module).items() if len(shape) > 1]
    if weights and not isinstance(module, _NORMS):
        return Kind(f"no kind of layer that is known; register_layer for its {weights}")
    return None


def is_quantized(module: Any) -> bool:
    """Whether a module holds 4-bit weights."""
    return isinstance(module, QUANTIZED) or any(
        isinstance(value, ForeignWeight) for value in vars(module).values()
    )


def dequantized(module: Any) -> nnx.Module | None:
    """The dense layer in the place of a 4-bit one; None where the module is none.

    A module of somebody else's class is changed in its place.
    """
    if isinstance(module, Linear4bit):
        return dense_linear(module, jnp.swapaxes(dequantize_stacked(module.weight), -1, -2))
    if isinstance(module, LinearGeneral4bit | Einsum4bit):
        return module.dense(module.fold.unfold(dequantize_stacked(module.weight)))
    if isinstance(module, Embedding4bit):
        return dense_embed(module, dequantize_stacked(module.weight))
    hosted = {n: v for n, v in vars(module).items() if isinstance(v, ForeignWeight)}
    for name, weight in hosted.items():
        setattr(module, name, restore(weight))
    return module if hosted else None


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(v.shape) for n, v in vars(module).items() if isinstance(v, nnx.Param)}


def _by(
    make: Callable[..., nnx.Module], weight: str
) -> Callable[[Any, str, dict[str, Any]], nnx.Module]:
    def quantize(module: Any, path: str, settings: dict[str, Any]) -> nnx.Module:
        return make(module, name=f"{path}.{weight}".removeprefix("."), **settings)

    return quantize


def _host(folds: dict[str, Any]) -> Callable[[Any, str, dict[str, Any]], nnx.Module]:
    def quantize(module: Any, path: str, settings: dict[str, Any]) -> nnx.Module:
        for name, fold in folds.items():
            host(module, name, f"{path}.{name}".removeprefix("."), fold, **settings)
        return module

    return quantize


def _why_not_embed(embed: Any) -> str | None:
    if type(embed) is not nnx.Embed:
        return other_class(nnx.Embed, embed)
    if embed.promote_dtype is not dtypes.promote_dtype:
        return "its promote_dtype was replaced"
    return None


def _embedding(embed: nnx.Embed, *, name: str, dtype: Any, **settings: Any) -> Embedding4bit:
    table = embed.embedding[...]
    try:
        return Embedding4bit(
            embed.num_embeddings,
            embed.features,
            dtype=embed.dtype if dtype is None else dtype,
            param_dtype=table.dtype,
            embedding_init=lambda *_: table,
            rngs=nnx.Rngs(0),
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def dense_linear(layer: Linear4bit, kernel: Array) -> nnx.Linear:
    """An `nnx.Linear` in a `Linear4bit`'s place, its bias shared; kernel `[*lead, in, out]`."""
    linear = nnx.Linear(
        layer.in_features,
        layer.out_features,
        use_bias=False,
        dtype=layer.dtype,
        param_dtype=kernel.dtype,
        kernel_init=lambda *_: kernel,
        rngs=nnx.Rngs(0),
    )
    linear.use_bias = layer.use_bias
    linear.bias = layer.bias
    return linear


def dense_embed(layer: Embedding4bit, table: Array) -> nnx.Embed:
    """An `nnx.Embed` in an `Embedding4bit`'s place; table `[*lead, num_embeddings, features]`."""
    return nnx.Embed(
        layer.num_embeddings,
        layer.features,
        dtype=layer.dtype or table.dtype,
        param_dtype=table.dtype,
        embedding_init=lambda *_: table,
        rngs=nnx.Rngs(0),
    )


def dequantize_stacked(weight: Params4bit) -> Array:
    """`[*lead, out, in]` of a weight in a module."""
    return thaw(weight).dequantize()
