"""Decoders: Llama, and what the table of families describes by its differences from Llama.

`Llama` is the model, `LlamaConfig` its configuration, and `LlamaShardings` shards it on a mesh.
`cross_entropy` is its loss, in blocks.
"""

from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.experts_config import ExpertsConfig
from q4jax.models.decoder.rope_scaling import RopeScaling
from q4jax.models.decoder.shardings import LlamaShardings
from q4jax.models.decoder.token_losses import cross_entropy

__all__ = [
    "ExpertsConfig",
    "Llama",
    "LlamaConfig",
    "LlamaShardings",
    "RopeScaling",
    "cross_entropy",
]
