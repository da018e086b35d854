"""The loss of fine-tuning: cross-entropy of the tokens that are to be learned."""

import jax
import jax.numpy as jnp

from q4jax.models.decoder.decoder import Llama


def loss(
    model: Llama,
    inputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Return the sum of the losses in nats of predicting `targets`, a float32 scalar.

    Args:
      model: the model.
      inputs: int32 `[B, T]`, tokens.
      targets: int32 `[B, T]`, the token that follows each.
      weights: float32 `[B, T]`, the factor of each token's loss: 0 at padding and in prompts.
      segments: int32 `[B, T]`, the document of each token; None: each row is one document.

    Examples:
      >>> from flax import nnx
      >>> from q4jax.models import LlamaConfig
      >>> model = Llama(LlamaConfig(64, 32, 48, 2, 4, 4, 8), rngs=nnx.Rngs(0))
      >>> tokens = jnp.array([[1, 2, 3, 4]])
      >>> float(loss(model, tokens[:, :-1], tokens[:, 1:], jnp.zeros((1, 3))))
      0.0
    """
    hidden, _ = model.hidden_states(inputs, segment_ids=segments)
    each = model.losses(hidden, jnp.where(weights == 0, -1, targets))
    return jnp.sum(each * weights)
