"""PEFT adapters."""

from q4jax.interop.peft.load_save import *  # noqa: F403
from q4jax.interop.peft.load_save import __all__ as __all__
