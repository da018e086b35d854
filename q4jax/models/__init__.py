"""The Llama family in NNX: models, pretrained weights, generation."""

from q4jax.models.generation.generate import generate
from q4jax.models.llama.config import LlamaConfig
from q4jax.models.llama.decoder import Llama
from q4jax.models.llama.shardings import LlamaShardings
from q4jax.models.pretrained.load import from_pretrained, from_tensors
from q4jax.models.pretrained.save import save_pretrained

__all__ = [
    "Llama",
    "LlamaConfig",
    "LlamaShardings",
    "from_pretrained",
    "from_tensors",
    "generate",
    "save_pretrained",
]
