"""PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

`load_adapters` adds them to a model, `save_adapters` writes those of a model;
`load_linen_adapters` and `save_linen_adapters` do so for the variables of a Linen model.
"""

from q4jax.interop.peft.config import AdapterConfig
from q4jax.interop.peft.linen import load_linen_adapters, save_linen_adapters
from q4jax.interop.peft.load import load_adapters
from q4jax.interop.peft.save import save_adapters
from q4jax.interop.peft.tensors import read_adapters

__all__ = [
    "AdapterConfig",
    "load_adapters",
    "load_linen_adapters",
    "read_adapters",
    "save_adapters",
    "save_linen_adapters",
]
