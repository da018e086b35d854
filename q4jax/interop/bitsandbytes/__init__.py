"""bitsandbytes files."""

from q4jax.interop.bitsandbytes.state_dict import *  # noqa: F403
from q4jax.interop.bitsandbytes.state_dict import __all__ as __all__
