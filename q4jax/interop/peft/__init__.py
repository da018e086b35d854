"""PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

`load_adapters` adds them to a 4-bit model, `save_adapters` writes those of a model.
"""

from q4jax.interop.peft.config import AdapterConfig
from q4jax.interop.peft.load_save import load_adapters, read_adapters, save_adapters

__all__ = ["AdapterConfig", "load_adapters", "read_adapters", "save_adapters"]
