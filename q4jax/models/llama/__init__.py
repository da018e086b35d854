"""The Llama family: Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts.

`Llama` is the model, `LlamaConfig` its configuration, and `LlamaShardings` shards it on a mesh.
"""

from q4jax.models.llama.config import ExpertsConfig, LlamaConfig
from q4jax.models.llama.decoder import Llama
from q4jax.models.llama.rope_scaling import RopeScaling
from q4jax.models.llama.shardings import LlamaShardings

__all__ = ["ExpertsConfig", "Llama", "LlamaConfig", "LlamaShardings", "RopeScaling"]
