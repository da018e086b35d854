"""The normalizations of decoders."""

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.mixer_spec import Norm
from q4jax.models.decoder.without_matrices import WithoutMatrices
from q4jax.nnx.converters import LayerConverter, register_converter


class DecoderNorm(WithoutMatrices):
    """RMSNorm or LayerNorm with float32 variables, computed in float32, in the input's dtype.

    Args:
      shape: shape of the scale; its last axis is normalized.
      spec: the kind of norm.
    """

    def __init__(self, shape: int | tuple[int, ...], spec: Norm):
        self.spec = spec
        if spec.scale:
            self.scale = nnx.Param(jnp.full(shape, 1.0 - spec.offset, jnp.float32))
        if spec.bias:
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize `x [..., features]`."""
        y = normalize(x.astype(jnp.float32), self.spec)
        if self.spec.scale:
            y = y * broadcast_to_rank(self.scale[...] + jnp.float32(self.spec.offset), y.ndim)
        if self.spec.bias:
            y = y + broadcast_to_rank(self.bias[...], y.ndim)
        return y.astype(x.dtype)


register_converter(LayerConverter(DecoderNorm, torch_names={"scale": "weight", "bias": "bias"}))


def broadcast_to_rank(vector: jax.Array, rank: int) -> jax.Array:
    """Give an array leading axes of length 1, which rank promotion may not do."""
    return vector.reshape((1,) * (rank - vector.ndim) + vector.shape)


def normalize(x: jax.Array, spec: Norm) -> jax.Array:
    """Normalize float32 `x [..., features]` without a scale."""
    if spec.kind == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + jnp.float32(spec.eps))
