"""Public alias of `q4jax.linen.serialization`, which registers when it is imported."""

from q4jax.linen import serialization as _  # noqa: F401
