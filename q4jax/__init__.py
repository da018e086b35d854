"""bitsandbytes' 4-bit layers for JAX and Flax."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from q4jax import linen, serialization  # serialization registers 4-bit weights with Flax
from q4jax.config import QuantConfig
from q4jax.folds import Fold
from q4jax.hosted import register_layer
from q4jax.matmul import matmul_4bit
from q4jax.params import Params4bit
from q4jax.quantize import dequantize_4bit, quantize_4bit
from q4jax.rules import QuantRule
from q4jax.spec import QuantSpec
from q4jax.state import QuantState

if TYPE_CHECKING:
    from q4jax import checkpoint, interop, models, native
    from q4jax.convert import dequantize_model, plan_quantization, quantize_model
    from q4jax.digests import fingerprint
    from q4jax.folded import Einsum4bit, LinearGeneral4bit
    from q4jax.layers import (
        Embedding4bit,
        EmbeddingFP4,
        EmbeddingNF4,
        Linear4bit,
        LinearFP4,
        LinearNF4,
    )
    from q4jax.lora import add_lora, merge_lora
    from q4jax.memory import memory_report, trainable_parameters
    from q4jax.named_adapters import AdapterBank
    from q4jax.placed import check_sharding

if "flax.nnx" in sys.modules:
    # So that a module may hold a Params4bit as an attribute before any layer here is used.
    importlib.import_module("q4jax.frozen")

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
    "Linear4bit": "q4jax.layers",
    "LinearNF4": "q4jax.layers",
    "LinearFP4": "q4jax.layers",
    "Embedding4bit": "q4jax.layers",
    "EmbeddingNF4": "q4jax.layers",
    "EmbeddingFP4": "q4jax.layers",
    "LinearGeneral4bit": "q4jax.folded",
    "Einsum4bit": "q4jax.folded",
    "plan_quantization": "q4jax.convert",
    "quantize_model": "q4jax.convert",
    "dequantize_model": "q4jax.convert",
    "memory_report": "q4jax.memory",
    "trainable_parameters": "q4jax.memory",
    "AdapterBank": "q4jax.named_adapters",
    "add_lora": "q4jax.lora",
    "merge_lora": "q4jax.lora",
    "fingerprint": "q4jax.digests",
    "check_sharding": "q4jax.placed",
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
