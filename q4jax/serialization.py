"""`flax.serialization` and `nn.tabulate` of 4-bit weights, registered by importing this module."""

from q4jax.linen import serialization as _serialization  # noqa: F401
from q4jax.linen import tabulate as _tabulate  # noqa: F401
