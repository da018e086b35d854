"""bitsandbytes' 4-bit layers for JAX and Flax."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from q4jax import linen, serialization  # serialization registers 4-bit weights with Flax
from q4jax.convert.config import QuantConfig
from q4jax.convert.kernel_axes import Fold
from q4jax.convert.registry import register_layer
from q4jax.convert.rules import QuantRule
from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState
from q4jax.ops.dequantize import dequantize_4bit
from q4jax.ops.matmul import matmul_4bit
from q4jax.ops.params import Params4bit
from q4jax.ops.quantize import quantize_4bit

if TYPE_CHECKING:
    from q4jax import checkpoint, interop, models, native
    from q4jax.lora.bank import AdapterBank
    from q4jax.lora.inject import add_lora, merge_lora
    from q4jax.nnx.convert import dequantize_model, plan_quantization, quantize_model
    from q4jax.nnx.einsum import Einsum4bit, LinearGeneral4bit
    from q4jax.nnx.linear import (
        Embedding4bit,
        EmbeddingFP4,
        EmbeddingNF4,
        Linear4bit,
        LinearFP4,
        LinearNF4,
    )
    from q4jax.tree.check_sharding import check_sharding
    from q4jax.tree.fingerprint import fingerprint
    from q4jax.tree.memory import memory_report, trainable_parameters

if "flax.nnx" in sys.modules:
    # So that a module may hold a Params4bit as an attribute before any layer here is used.
    importlib.import_module("q4jax.nnx.variables")

__version__ = "0.1.0"

# In the order in which data flows.
__all__ = [  # noqa: RUF022
    "quantize_4bit",
    "dequantize_4bit",
    "matmul_4bit",
    "QuantSpec",
    "QuantState",
    "Params4bit",
    "Linear4bit",
    "LinearNF4",
    "LinearFP4",
    "Embedding4bit",
    "EmbeddingNF4",
    "EmbeddingFP4",
    "LinearGeneral4bit",
    "Einsum4bit",
    "linen",
    "serialization",
    "QuantConfig",
    "QuantRule",
    "Fold",
    "register_layer",
    "plan_quantization",
    "quantize_model",
    "dequantize_model",
    "memory_report",
    "trainable_parameters",
    "add_lora",
    "merge_lora",
    "AdapterBank",
    "fingerprint",
    "check_sharding",
    "checkpoint",
    "interop",
    "models",
    "native",
]

# What needs flax.nnx or orbax, which take a second to import and which `import flax` leaves out.
_LAZY = {
    "Linear4bit": "q4jax.nnx.linear",
    "LinearNF4": "q4jax.nnx.linear",
    "LinearFP4": "q4jax.nnx.linear",
    "Embedding4bit": "q4jax.nnx.linear",
    "EmbeddingNF4": "q4jax.nnx.linear",
    "EmbeddingFP4": "q4jax.nnx.linear",
    "LinearGeneral4bit": "q4jax.nnx.einsum",
    "Einsum4bit": "q4jax.nnx.einsum",
    "plan_quantization": "q4jax.nnx.convert",
    "quantize_model": "q4jax.nnx.convert",
    "dequantize_model": "q4jax.nnx.convert",
    "memory_report": "q4jax.tree.memory",
    "trainable_parameters": "q4jax.tree.memory",
    "AdapterBank": "q4jax.lora.bank",
    "add_lora": "q4jax.lora.inject",
    "merge_lora": "q4jax.lora.inject",
    "fingerprint": "q4jax.tree.fingerprint",
    "check_sharding": "q4jax.tree.check_sharding",
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "interop", "models", "native"):
        return importlib.import_module(f"q4jax.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'q4jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
