"""The inputs that each layer of Gemma 4 has of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.norm import DecoderNorm
from q4jax.models.decoder.spec import Decoder


def add_per_layer(model: Any, spec: Decoder, rngs: nnx.Rngs, **linear: Any) -> None:
    """Give a model the modules of these inputs, under the names that checkpoints have."""
    total = len(spec.layers) * spec.layers[0].per_layer
    model.embed_tokens_per_layer = nnx.Embed(spec.per_layer_vocab, total, rngs=rngs, **linear)
    model.per_layer_model_projection = nnx.Linear(
        spec.hidden_size, total, use_bias=False, rngs=rngs, **linear
    )
    model.per_layer_projection_norm = DecoderNorm(spec.layers[0].per_layer, spec.norm)


def per_layer_inputs(model: Any, spec: Decoder, input_ids: jax.Array, x: jax.Array) -> jax.Array:
    """Return `[layers, B, T, width]`: an embedding for each layer, and a part of the common one.

    Args:
      model: what `add_per_layer` was given.
      spec: its description.
      input_ids: int `[B, T]`.
      x: their common embedding, `[B, T, hidden]`.
    """
    width = spec.layers[0].per_layer
    shape = (*input_ids.shape, len(spec.layers), width)
    common = model.per_layer_model_projection(x) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
    common = model.per_layer_projection_norm(common.reshape(shape))
    own = model.embed_tokens_per_layer(input_ids).reshape(shape)
    own = own * jnp.asarray(width**0.5, own.dtype)
    return jnp.moveaxis((common + own) * jnp.asarray(2**-0.5, x.dtype), 2, 0)
