"""Hugging Face model directories: `config.json` and safetensors files.

`load_directory` and `save_directory` convert the weights of any model, in full precision or in
bitsandbytes' 4 bits; `q4jax.models` builds models from them.
"""

from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.huggingface.linear_layers import is_linear
from q4jax.interop.huggingface.load_save import load_directory, save_directory
from q4jax.interop.huggingface.quantization_config import bnb_config

__all__ = ["Checkpoint", "bnb_config", "is_linear", "load_directory", "save_directory"]
