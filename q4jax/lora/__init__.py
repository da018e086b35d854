"""LoRA adapters on frozen layers."""

from q4jax.lora.inject import *  # noqa: F403
from q4jax.lora.inject import __all__ as __all__
