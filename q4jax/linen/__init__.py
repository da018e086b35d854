"""The 4-bit layers for Flax Linen, and the quantization of Linen models.

4-bit weights are in a collection of their own, `"quant"`, a `Params4bit` for each layer; biases are
in `"params"`. Differentiate and optimize `"params"` and pass `"quant"` along:
`model.apply({"params": params, "quant": quant}, x)`. `nn.scan` and `nn.vmap` take
`variable_axes={"params": 0, "quant": 0}`. `add_lora` puts adapters into a third collection, "lora".
"""

import warnings
from typing import Any

from q4jax.linen.convert import merge_quantized, plan_quantization, quantize_model
from q4jax.linen.layers import (
    Embedding4bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    LinearFP4,
    LinearNF4,
)
from q4jax.linen.lora import add_lora, merge_lora
from q4jax.linen.variables import COLLECTION, quantize_variables

__all__ = [
    "COLLECTION",
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "add_lora",
    "merge_lora",
    "merge_quantized",
    "plan_quantization",
    "quantize_model",
    "quantize_variables",
]

_RENAMED = {
    "place_weights": merge_quantized,
    "plan_params": plan_quantization,
    "quantize_params": quantize_model,
}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module 'q4jax.linen' has no attribute {name!r}")
    new = _RENAMED[name]
    message = f"q4jax.linen.{name} is now q4jax.linen.{new.__name__}"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return new
