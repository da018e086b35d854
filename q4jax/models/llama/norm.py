"""RMSNorm of the Llama family."""

import jax
import jax.numpy as jnp
from flax import nnx


class LlamaRMSNorm(nnx.RMSNorm):
    """RMSNorm with a float32 scale, computed in float32 and cast to the input's dtype."""

    def __init__(self, features: int, epsilon: float, rngs: nnx.Rngs):
        dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}
        super().__init__(features, epsilon=epsilon, rngs=rngs, **dtypes)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalize `x [..., features]`; `mask` is that of `nnx.RMSNorm`."""
        y: jax.Array = super().__call__(x, mask)
        return y.astype(x.dtype)
