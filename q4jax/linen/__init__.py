"""The 4-bit layers for Flax Linen."""

from q4jax.linen.layers import *  # noqa: F403
from q4jax.linen.layers import __all__ as __all__
