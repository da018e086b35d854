"""Public alias of `q4jax.core.codebooks`."""

from q4jax.core.codebooks import *  # noqa: F403
