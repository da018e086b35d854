"""`merge_lora`: merge the adapters of a model into its weights."""

from typing import Any, Literal, TypeVar, overload

import jax.numpy as jnp
from flax import nnx
from jax import Array

from q4jax.lora.adapter import Adapter, kernel_axes_of
from q4jax.lora.weight import LoRAWeight
from q4jax.nnx.converters import converter_for, to_dense
from q4jax.nnx.quantized_variable import QuantizedVariable, quantize_variable, to_variable
from q4jax.nnx.traverse import check_module, replace_modules
from q4jax.ops.params import Params4bit

M = TypeVar("M")


class MergeErrors(dict[str, float]):
    """The error of each layer by dotted path, printed one a line, the largest first."""

    def __str__(self) -> str:
        ranked = sorted(self.items(), key=lambda item: -item[1])
        return "\n".join(f"{error:.4f}  {path or '(root)'}" for path, error in ranked)


@overload
def merge_lora(model: M, *, requantize: Literal[False] = False) -> M: ...
@overload
def merge_lora(model: M, *, requantize: Literal[True]) -> tuple[M, MergeErrors]: ...
def merge_lora(model: M, *, requantize: bool = False) -> M | tuple[M, MergeErrors]:
    """Return a model with its adapters merged into the weights.

    Args:
      model: an nnx module with adapters; it is not changed.
      requantize: whether layers that were 4-bit are quantized again with their settings, which
        rounds away a part of the adapter. Otherwise each adapted layer becomes a dense one
        (`nnx.Linear` and so on) in the dtype that its weight was quantized from.

    Returns:
      The new model. With `requantize`, also the error of each adapted layer by dotted path, the
      Frobenius norm |result - merged| / |merged| with `merged` in float32.

    Raises:
      ValueError: the model has no adapter.
      TypeError: `model` is not an nnx module.

    Examples:
      >>> import q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> type(q4jax.merge_lora(model)).__name__
      'Linear'
      >>> _, errors = q4jax.merge_lora(model, requantize=True)
      >>> errors[""] < 0.12
      True
    """
    check_module(model)
    errors = MergeErrors()

    def replace(path: str, module: nnx.Module) -> Any:
        if not isinstance(module, Adapter):
            return module
        merge: Any = _merge_weight if isinstance(module, LoRAWeight) else _merge_layer
        new, found, exact = merge(module, path, requantize)
        error = found.astype(jnp.float32) - exact
        errors[path] = float(jnp.linalg.norm(error.ravel()) / jnp.linalg.norm(exact.ravel()))
        return new

    merged = replace_modules(model, replace)
    if not errors:
        raise ValueError("merge_lora: the model has no adapter; add_lora makes them")
    return (merged, errors) if requantize else merged


def _merge_layer(adapter: Any, path: str, requantize: bool) -> tuple[nnx.Module, Array, Array]:
    """Return the new layer, its weight, and the weight without rounding."""
    base = adapter.base
    converter, delta = converter_for(base), adapter.delta()
    assert converter is not None and converter.to_4bit is not None
    name = converter.weight
    if not converter.is_embedding:
        delta = kernel_axes_of(base).from_matrices(jnp.swapaxes(delta, -1, -2))
    was_4bit = to_dense(base)
    dense: Any = nnx.clone(base) if was_4bit is None else was_4bit
    variable = getattr(dense, name)
    exact = variable[...].astype(jnp.float32) + delta
    setattr(dense, name, variable.replace(exact.astype(variable.dtype)))
    if not requantize or was_4bit is None:
        return dense, getattr(dense, name)[...], exact
    settings = {**_settings(base.weight), "dtype": base.dtype}
    layer: Any = converter.quantize(dense, path, settings)
    layer.implementation = base.implementation
    return layer, getattr(to_dense(layer), name)[...], exact


def _merge_weight(adapter: LoRAWeight, path: str, requantize: bool) -> tuple[Any, Array, Array]:
    """Return the new Variable, its array, and the array without rounding."""
    base = adapter.base
    was_4bit = isinstance(base, QuantizedVariable)
    variable = to_variable(base) if was_4bit else base
    exact = variable[...].astype(jnp.float32) + adapter.spread()
    variable = variable.replace(exact.astype(variable.dtype))
    if not was_4bit or not requantize:
        return variable, variable[...], exact
    settings = {**_settings(base.weight), "dtype": base.dtype}
    weight = quantize_variable(variable, path, base.kernel_axes, **settings)
    return weight, to_variable(weight)[...], exact


def _settings(weight: Params4bit) -> dict[str, Any]:
    spec = weight.quant_state.spec
    return {
        "quant_type": spec.quant_type,
        "blocksize": spec.blocksize,
        "compress_statistics": spec.nested,
    }
