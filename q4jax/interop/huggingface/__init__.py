"""Hugging Face directories."""

from q4jax.interop.huggingface.load_save import *  # noqa: F403
from q4jax.interop.huggingface.load_save import __all__ as __all__
