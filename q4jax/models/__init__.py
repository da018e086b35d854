"""The Llama family in NNX: models, pretrained weights, generation."""

from q4jax.models.config import LlamaConfig
from q4jax.models.generate import generate
from q4jax.models.llama import Llama
from q4jax.models.pretrained import from_pretrained, from_tensors
from q4jax.models.saving import save_pretrained
from q4jax.models.sharding import LlamaShardings

__all__ = [
    "Llama",
    "LlamaConfig",
    "LlamaShardings",
    "from_pretrained",
    "from_tensors",
    "generate",
    "save_pretrained",
]
