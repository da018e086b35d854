"""Checkpoints on Orbax."""

from q4jax.checkpoint.orbax import *  # noqa: F403
from q4jax.checkpoint.orbax import ARRAYS as ARRAYS
from q4jax.checkpoint.orbax import HEADER as HEADER
from q4jax.checkpoint.orbax import __all__ as __all__
