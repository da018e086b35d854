"""The decoder of the Llama family in Flax NNX, with Hugging Face's names and arithmetic.

Every projection is a submodule, so `q4jax.quantize_model` and `q4jax.add_lora` can replace it. The
decoder layers are one module with a leading layer axis, run by `nnx.scan`, so the size of the
program does not depend on the depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from q4jax.models.llama.attention import AttentionMasks, LayerInfo, LlamaAttention, Rotation
from q4jax.models.llama.config import LlamaConfig
from q4jax.models.llama.experts import LlamaExperts
from q4jax.models.llama.kv_cache import KVCache
from q4jax.models.llama.mlp import LlamaMLP
from q4jax.models.llama.norm import LlamaRMSNorm
from q4jax.models.llama.rope import rotation
from q4jax.sharding.residual import whole_features

Carry = tuple[jax.Array, KVCache | None]  # residual stream, cache


class LlamaDecoderLayer(nnx.Module):
    """A pre-norm decoder layer: attention, then an MLP or experts, each with a residual sum."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, **linear: Any):
        def norm() -> LlamaRMSNorm:
            return LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, rngs)

        self.input_layernorm = norm()
        self.self_attn = LlamaAttention(config, rngs, **linear)
        self.post_attention_layernorm = norm()
        self.mlp = (
            LlamaMLP(config, config.intermediate_size, rngs, **linear)
            if config.experts is None
            else LlamaExperts(config, config.experts, rngs, **linear)
        )

    def __call__(
        self,
        x: jax.Array,
        rope: Rotation,
        masks: AttentionMasks,
        cache: KVCache | None,
        layer: LayerInfo,
    ) -> Carry:
        """Apply the layer to `x [B, T, hidden_size]`; arguments as in `LlamaAttention`."""
        # Features are unsharded at the ends of each block, whatever the weights' sharding.
        h = whole_features(self.input_layernorm(x))
        y, cache = self.self_attn(h, rope, masks, cache, layer)
        x = whole_features(x + whole_features(y))
        h = whole_features(self.post_attention_layernorm(x))
        return whole_features(x + whole_features(self.mlp(h))), cache


class Llama(nnx.Module):
    """A language model of the Llama family: `model(input_ids [B, T]) -> logits [B, T, vocab_size]`.

    Args:
      config: sizes, constants and architecture.
      dtype: compute dtype, also of the logits; None: the dtype of the weights. Norms, rotary
        embeddings and softmax are computed in float32.
      param_dtype: dtype of the initial weights; norm scales are float32.
      remat: recompute each layer in the backward pass instead of storing its activations.
      rngs: random streams for the initial weights.

    The variables of `layers` are stacked: `layers.mlp.up_proj.kernel` is `[num_hidden_layers,
    in, out]`, and that of experts `[num_hidden_layers, num_experts, in, out]`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> LlamaDecoderLayer:
            return LlamaDecoderLayer(config, rngs, **dtypes)

        self.config = config
        self.remat = remat
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
        self.layers = stack(rngs)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, **dtypes
            )

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Return next-token logits of complete sequences.

        Args:
          input_ids: int `[B, T]`.
          positions: int `[B, T]`; None: 0, 1, 2, … over the real tokens of each row.
          attention_mask: bool or int `[B, T]`, 0 at padding on either side; None: no padding.

        Returns:
          `[B, T, vocab_size]` in the compute dtype.
        """
        return self.logits(self.hidden_states(input_ids, positions, attention_mask)[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits `[..., vocab_size]` of hidden states `[..., hidden_size]`."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Carry:
        """Return the normalized residual stream `[B, T, hidden_size]` and the extended cache.

        Args:
          input_ids: int `[B, T]`; with a cache, tokens that follow those in it.
          positions: int `[B, T]`, as in `__call__`.
          attention_mask: `[B, T]`, as in `__call__`.
          cache: keys and values of earlier tokens, with T free slots; None: no cache.

        Raises:
          ValueError: `input_ids` is not an int array `[B, T]`, concrete token ids are out of range,
            or the cache has fewer than T free slots and its length is concrete.
        """
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(
                f"input_ids must be int [batch, tokens], got {input_ids.dtype}{input_ids.shape}"
            )
        check_token_ids("input_ids", input_ids, self.config.vocab_size)
        tokens = input_ids.shape[1]
        real = None if attention_mask is None else attention_mask.astype(bool)
        start: jax.Array | int = 0
        if cache is not None:
            start = cache.length
            cache = cache.open(jnp.ones(input_ids.shape, bool) if real is None else real)
            real = cache.mask
        masks = AttentionMasks.from_slots(self.config, real, start, tokens)
        if positions is None:
            positions = _positions(real, start, input_ids.shape)
        rope = rotation(positions, self.config)

        def run(block: LlamaDecoderLayer, carry: Carry, layer: LayerInfo) -> Carry:
            x, cache = carry
            return block(x, rope, masks, cache, layer)

        if self.remat:
            run = nnx.remat(run, prevent_cse=False, graph_updates=False)
        run = nnx.scan(run, in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry, graph_updates=False)
        indices = jnp.arange(self.config.num_hidden_layers)
        layers = LayerInfo(indices, jnp.asarray(self.config.windowed))
        x, cache = run(self.layers, (whole_features(self.embed_tokens(input_ids)), cache), layers)
        return self.norm(x), cache if cache is None else cache.close(tokens)


def check_token_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Raise ValueError if concrete token ids are not in the vocabulary."""
    if isinstance(ids, jax.core.Tracer):
        return
    found = np.asarray(ids)
    wrong = found[(found < 0) | (found >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{name} must be from 0 to vocab_size-1={vocab_size - 1}, got {wrong.flat[0]}"
        )


def _positions(real: jax.Array | None, start: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Return positions int32 `[B, T]`: the number of real tokens before each slot."""
    if real is None:
        return jnp.broadcast_to(jnp.arange(shape[1]), shape)
    count = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    return jax.lax.dynamic_slice_in_dim(count, start, shape[1], axis=1)
