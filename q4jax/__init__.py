"""bitsandbytes' 4-bit layers for JAX and Flax."""

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from q4jax import linen, serialization  # serialization registers 4-bit weights with Flax
from q4jax.convert.config import QuantConfig
from q4jax.convert.kernel_axes import KernelAxes
from q4jax.convert.registry import register_layer
from q4jax.convert.rules import QuantRule
from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState
from q4jax.ops import params
from q4jax.ops.dequantize import dequantize_4bit
from q4jax.ops.matmul import matmul_4bit
from q4jax.ops.params import Params4bit
from q4jax.ops.quantize import quantize_4bit
from q4jax.ops.weight_of_stack import weight_of_stack

if TYPE_CHECKING:  # the names of _LAZY, for type checkers
    from q4jax import checkpoint as checkpoint
    from q4jax import finetune as finetune
    from q4jax import integrations as integrations
    from q4jax import interop as interop
    from q4jax import models as models
    from q4jax import native as native
    from q4jax.lora.bank import AdapterBank as AdapterBank
    from q4jax.lora.inject import add_lora as add_lora
    from q4jax.lora.merge import merge_lora as merge_lora
    from q4jax.nnx.convert import dequantize_model as dequantize_model
    from q4jax.nnx.convert import plan_quantization as plan_quantization
    from q4jax.nnx.convert import quantize_model as quantize_model
    from q4jax.nnx.einsum import Einsum4bit as Einsum4bit
    from q4jax.nnx.einsum import LinearGeneral4bit as LinearGeneral4bit
    from q4jax.nnx.embedding import Embedding4bit as Embedding4bit
    from q4jax.nnx.embedding import EmbeddingFP4 as EmbeddingFP4
    from q4jax.nnx.embedding import EmbeddingNF4 as EmbeddingNF4
    from q4jax.nnx.linear import Linear4bit as Linear4bit
    from q4jax.nnx.linear import LinearFP4 as LinearFP4
    from q4jax.nnx.linear import LinearNF4 as LinearNF4
    from q4jax.tree.check_sharding import check_sharding as check_sharding
    from q4jax.tree.fingerprint import fingerprint as fingerprint
    from q4jax.tree.memory import memory_report as memory_report
    from q4jax.tree.memory import trainable_report as trainable_report

__version__ = "0.1.0"

# Modules that need flax.nnx or orbax, which take a second to import: imported at first use.
_LAZY: dict[str, tuple[str, ...]] = {
    "q4jax.nnx.linear": ("Linear4bit", "LinearNF4", "LinearFP4"),
    "q4jax.nnx.embedding": ("Embedding4bit", "EmbeddingNF4", "EmbeddingFP4"),
    "q4jax.nnx.einsum": ("LinearGeneral4bit", "Einsum4bit"),
    "q4jax.nnx.convert": ("plan_quantization", "quantize_model", "dequantize_model"),
    "q4jax.tree.memory": ("memory_report", "trainable_report"),
    "q4jax.tree.fingerprint": ("fingerprint",),
    "q4jax.tree.check_sharding": ("check_sharding",),
    "q4jax.lora.inject": ("add_lora",),
    "q4jax.lora.merge": ("merge_lora",),
    "q4jax.lora.bank": ("AdapterBank",),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}
_SUBMODULES = ("checkpoint", "finetune", "integrations", "interop", "models", "native")
_RENAMED = {
    "Fold": ("q4jax.convert.kernel_axes", "Fold", "KernelAxes"),
    "trainable_parameters": ("q4jax.tree.memory", "trainable_report", "trainable_report"),
}

__all__ = [
    "quantize_4bit",
    "dequantize_4bit",
    "matmul_4bit",
    "weight_of_stack",
    "QuantSpec",
    "QuantState",
    "Params4bit",
    "linen",
    "serialization",
    "QuantConfig",
    "QuantRule",
    "KernelAxes",
    "register_layer",
    *_MODULE_OF,
    *_SUBMODULES,
]

if "flax.nnx" in sys.modules:
    # So that a module may hold a Params4bit as an attribute before any layer here is used.
    importlib.import_module("q4jax.nnx.variables")

# The modules that pickles of 0.1.0 name.
for _name in ("params", "state", "spec"):
    sys.modules[f"q4jax.{_name}"] = params


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"q4jax.{name}")
    if name in _RENAMED:
        module, present, new = _RENAMED[name]
        warnings.warn(f"q4jax.{name} is now q4jax.{new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), present)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'q4jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
