"""The training loss of a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax.models.decoder.head import head_of
from q4jax.models.decoder.on_mesh import leaves_axes_to_compiler
from q4jax.models.decoder.places import of_rows, of_scalar
from q4jax.models.decoder.token_losses import BLOCK, losses


class HasLoss:
    """A model with hidden states and logits, and thus with a loss."""

    config: Any
    hidden_states: Any  # methods of the model
    logits: Any

    @leaves_axes_to_compiler(of_scalar)
    def loss(
        self,
        input_ids: jax.Array,
        labels: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        block: int | None = None,
    ) -> jax.Array:
        """Return the mean cross-entropy of next tokens in nats, float32 scalar.

        Logits are computed in blocks, as by `cross_entropy`: all of them together never exist.

        Args:
          input_ids: int `[B, T]`.
          labels: int `[B, T]`, as Hugging Face's: token t is predicted from those before it, and a
            negative label, such as -100, is ignored. None: `input_ids`.
          positions: int `[B, T]`, as in a call of the model.
          attention_mask: bool or int `[B, T]`; labels at padding are ignored.
          segment_ids: int `[B, T]`; the first label of each document is ignored.
          block: tokens of a block of logits; see `cross_entropy`.

        Returns:
          The mean over the labels that are not ignored; 0 where all are.

        Raises:
          ValueError: as in a call of the model; labels have another shape or dtype, or a concrete
            one is not in the vocabulary.

        Examples:
          >>> from flax import nnx
          >>> from q4jax.models import Llama, LlamaConfig
          >>> model = Llama(LlamaConfig(64, 32, 48, 2, 4, 4, 8), rngs=nnx.Rngs(0))
          >>> 3 < float(model.loss(jnp.array([[1, 2, 3, 4]]))) < 6
          True
        """
        hidden, _ = self.hidden_states(
            input_ids, positions, attention_mask, segment_ids=segment_ids
        )
        found = input_ids if labels is None else labels
        if found.shape != input_ids.shape or not jnp.issubdtype(found.dtype, jnp.integer):
            raise ValueError(
                f"labels must be int {list(input_ids.shape)} as input_ids, got "
                f"{found.dtype}{list(found.shape)}"
            )
        _check_labels(found, self.config.vocab_size)
        targets = found.astype(jnp.int32)
        for array in (attention_mask, segment_ids):
            if array is None:
                continue
            own = jnp.broadcast_to(jnp.asarray(array), found.shape)
            if array is segment_ids:
                same = own[:, 1:] == own[:, :-1]
                own = jnp.pad(same, ((0, 0), (1, 0)))
            targets = jnp.where(own.astype(bool), targets, -1)
        # The last token predicts none; its row stays, so that the blocks are of equal size.
        targets = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        total = jnp.sum(self.losses(hidden, targets, block))
        return total / jnp.maximum(jnp.sum(targets >= 0), 1).astype(jnp.float32)

    @leaves_axes_to_compiler(of_rows)
    def losses(self, hidden: jax.Array, labels: jax.Array, block: int | None = None) -> jax.Array:
        """Return the loss of each label in nats, float32 `[B, T]`; see `cross_entropy`.

        Args:
          hidden: `[B, T, hidden_size]`, as from `hidden_states`.
          labels: int `[B, T]`, the token that each of them predicts; a negative one is ignored.
          block: tokens of a block of logits.
        """
        head = head_of(self, hidden)
        if head is not None:
            return losses(hidden, head[1], head[0], labels, block)
        # A head of another kind computes all logits of a few tokens, and again for the gradient.
        run = nnx.remat(_losses_of_block, prevent_cse=True)
        width = max(1, (block or BLOCK) // len(hidden))
        starts = range(0, hidden.shape[1], width)
        parts = [(hidden[:, at : at + width], labels[:, at : at + width]) for at in starts]
        return jnp.concatenate([run(self, *part) for part in parts], axis=1)


def _losses_of_block(model: HasLoss, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model.logits(hidden).astype(jnp.float32)
    ids = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
    own = jnp.take_along_axis(logits, ids, axis=-1)[..., 0]
    return jnp.where(labels >= 0, jax.nn.logsumexp(logits, axis=-1) - own, 0.0)


def _check_labels(labels: Any, vocab_size: int) -> None:
    if isinstance(labels, jax.core.Tracer):
        return
    largest = np.asarray(labels).max(initial=-1)
    if largest >= vocab_size:
        raise ValueError(f"labels must be below vocab_size={vocab_size}, got {largest}")
