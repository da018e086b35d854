"""A decoder in Flax NNX, with Hugging Face's names and arithmetic.

Every projection is a submodule, so `q4jax.quantize_model` and `q4jax.add_lora` can replace it.
Layers that are alike, or that repeat with a period, have variables with a leading axis and are run
by a scan, so the size of the program does not depend on the depth.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from q4jax.models.decoder.attention import Lent
from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.context import Context
from q4jax.models.decoder.decoder_layer import DecoderLayer
from q4jax.models.decoder.describe import family_of
from q4jax.models.decoder.kv_cache import KVCache, States
from q4jax.models.decoder.loss import HasLoss
from q4jax.models.decoder.mixer_spec import Attention
from q4jax.models.decoder.norm import DecoderNorm, broadcast_to_rank
from q4jax.models.decoder.on_mesh import leaves_axes_to_compiler
from q4jax.models.decoder.per_layer import add_per_layer, per_layer_inputs
from q4jax.models.decoder.places import of_rows, of_states
from q4jax.models.decoder.remat import policy_of
from q4jax.models.decoder.scanned import (
    by_period,
    give_weights,
    hold_weights,
    places,
    scan_layers,
)
from q4jax.models.decoder.sequences import Sequences, check_token_ids
from q4jax.models.decoder.stacks import Stack, group_layers
from q4jax.ops.embedding import widen
from q4jax.sharding.residual import whole_features

Carry = tuple[jax.Array, dict[str, States], Lent]  # residual stream, states of a group, lent keys


class Llama(HasLoss, nnx.Module):
    """A language model: `model(input_ids [B, T]) -> logits [B, T, vocab_size]`.

    It computes what its config describes, for every architecture of the table of families; Llama is
    the plainest of them.

    Args:
      config: sizes, constants and architecture.
      dtype: compute dtype, also of the logits; None: the dtype of the weights. Norms, rotary
        embeddings and softmax are computed in float32.
      param_dtype: dtype of the initial weights; norm scales are float32.
      remat: what the backward pass computes again. None or False: nothing; "layer" or True: each
        layer, from its input; "attention": the same, but attention's results are kept;
        "projections": only what is cheap, since attention and projections are kept.
      attention: "whole": the scores `[heads, T, S]` of a layer are in memory at once; "blocks": a
        block of them at a time; None: in blocks where T * S is above 2**20.
      kinds: what layers must have in common to share a stack, besides their arithmetic, one
        hashable value for each; None: nothing. A loader passes which weights are 4-bit.
      rngs: random streams for the initial weights.

    The variables of `layers` are stacked: `layers.mlp.up_proj.kernel` is `[num_hidden_layers,
    in, out]`, and that of experts `[num_hidden_layers, num_experts, in, out]`. Where layers differ,
    each stack has a name of its own: `layers.from_5` holds layer 5 and those that repeat it, whose
    numbers `stacks` tells.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool | str | None = None,
        attention: str | None = None,
        kinds: Sequence[Hashable] | None = None,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        spec = config.decoder

        self.config, self.remat, self.attention = config, remat, attention
        self.groups = group_layers(spec.layers, kinds)
        self.embed_tokens = nnx.Embed(spec.vocab_size, spec.hidden_size, rngs=rngs, **dtypes)
        if spec.positions:
            self.embed_positions = nnx.Embed(spec.positions, spec.hidden_size, rngs=rngs, **dtypes)
        if spec.embed_norm:
            self.embed_norm = DecoderNorm(spec.hidden_size, spec.norm)
        if spec.layers[0].per_layer:
            add_per_layer(self, spec, rngs, **dtypes)
        made = {stack.name: _make(stack, spec.hidden_size, rngs, **dtypes) for stack in self.stacks}
        apart = {name.partition(".")[2]: stack for name, stack in made.items()}
        self.layers: Any = made["layers"] if "layers" in made else nnx.Dict(apart)
        self.norm = DecoderNorm(spec.hidden_size, spec.norm)
        if spec.tied and spec.head_bias:
            self.lm_head_bias = nnx.Param(jnp.zeros(spec.vocab_size, param_dtype))
        if not spec.tied:
            self.lm_head = nnx.Linear(
                spec.hidden_size, spec.vocab_size, use_bias=spec.head_bias, rngs=rngs, **dtypes
            )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of layers, in the order of their first layers."""
        return tuple(stack for group in self.groups for stack in group)

    @property
    def checkpoint_stacks(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name of each stack -> name of the list of layers in checkpoints, and their numbers."""
        name = family_of({"model_type": self.config.model_type}).layers
        return {stack.name: (name, stack.numbers) for stack in self.stacks}

    def stack(self, name: str) -> DecoderLayer:
        """Return the layers of the stack of this name."""
        found = self.layers if name == "layers" else self.layers[name.partition(".")[2]]
        assert isinstance(found, DecoderLayer)
        return found

    @leaves_axes_to_compiler(of_rows)
    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Return next-token logits of complete sequences.

        A row may hold several documents, told apart by `segment_ids`. Their logits are those of
        each document alone. Positions tell nothing apart: without `segment_ids`, all tokens of a
        row attend to the earlier ones. Positions that restart in a row are an error then, unless
        they are traced, as inside `jax.jit`, where their values cannot be seen.

        Args:
          input_ids: int `[B, T]`.
          positions: int `[B, T]`; None: 0, 1, 2, … over the real tokens of each document.
          attention_mask: bool or int `[B, T]`, 0 at padding on either side, 1 elsewhere; None: no
            padding.
          segment_ids: int `[B, T]`, the document of each token, such as `[[0, 0, 0, 1, 1]]`; a
            token attends to tokens of its own document only. None: each row is one document.

        Returns:
          `[B, T, vocab_size]` in the compute dtype.

        Raises:
          ValueError: an argument has another shape or dtype; concrete token ids are out of range,
            a concrete mask has other values than 0 and 1, or concrete positions do not rise from
            token to token of a document.

        Examples:
          >>> from flax import nnx
          >>> from q4jax.models import Llama, LlamaConfig
          >>> model = Llama(LlamaConfig(64, 32, 48, 2, 4, 4, 8), rngs=nnx.Rngs(0))
          >>> ids, documents = jnp.array([[1, 2, 3, 4, 5]]), jnp.array([[0, 0, 0, 1, 1]])
          >>> packed, alone = model(ids, segment_ids=documents), model(ids[:, 3:])
          >>> bool(jnp.allclose(packed[:, 3:], alone, atol=1e-5))
          True
        """
        hidden, _ = self.hidden_states(
            input_ids, positions, attention_mask, segment_ids=segment_ids
        )
        return self.logits(hidden)

    @leaves_axes_to_compiler(of_rows)
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits `[..., vocab_size]` of hidden states `[..., hidden_size]`."""
        spec = self.config.decoder
        y = self.embed_tokens.attend(hidden) if spec.tied else self.lm_head(hidden)
        if spec.tied and spec.head_bias:
            y = y + broadcast_to_rank(self.lm_head_bias[...].astype(y.dtype), y.ndim)
        if spec.logit_scale != 1.0:
            y = y * jnp.asarray(spec.logit_scale, y.dtype)
        if spec.logit_cap is not None:
            cap = jnp.asarray(spec.logit_cap, y.dtype)
            y = jnp.tanh(y / cap) * cap
        return y

    @leaves_axes_to_compiler(of_states)
    def hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        cache: KVCache | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Return the normalized residual stream `[B, T, hidden_size]` and the extended cache.

        Args:
          input_ids: int `[B, T]`; with a cache, tokens that follow those in it.
          positions: int `[B, T]`, as in `__call__`.
          attention_mask: bool or int `[B, T]`, as in `__call__`.
          cache: keys and values of earlier tokens, with T free slots; None: no cache. Its rows are
            one document each.
          segment_ids: int `[B, T]`, as in `__call__`; must be None with a cache.

        Raises:
          ValueError: as in `__call__`; `segment_ids` and `cache` are both given; the cache has
            fewer than T free slots and its length is concrete.
        """
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(
                f"input_ids must be int [batch, tokens], got {input_ids.dtype}{input_ids.shape}"
            )
        check_token_ids("input_ids", input_ids, self.config.vocab_size)
        input_ids = widen(input_ids)
        sequences, cache = Sequences.from_arguments(
            input_ids.shape, positions, attention_mask, segment_ids, cache
        )
        context = Context.from_sequences(self.stacks, sequences, cache, self.attention)
        x, inputs = self._embed(input_ids, sequences)
        states: dict[str, States] = {} if cache is None else dict(cache.states)
        lent = self._nothing_lent(x, context)
        for group in self.groups:
            own = {stack.name: states[stack.name] for stack in group if stack.name in states}
            x, own, lent = self._run(group, (x, own, lent), context, inputs)
            states |= own
        if cache is not None:
            cache = cache.close(states, context.ranks, context.real)
        return self.norm(x), cache

    def _embed(
        self, input_ids: jax.Array, sequences: Sequences
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the residual stream, and each layer's own inputs `[layers, B, T, width]`."""
        spec = self.config.decoder
        x = self.embed_tokens(input_ids)
        if spec.embed_scale != 1.0:
            x = x * jnp.asarray(spec.embed_scale, x.dtype)
        if spec.positions:
            x = x + self.embed_positions(sequences.positions + spec.position_offset)
        if spec.embed_norm:
            x = self.embed_norm(x)
        x = whole_features(x)
        has_inputs = spec.layers[0].per_layer > 0
        return x, per_layer_inputs(self, spec, input_ids, x) if has_inputs else None

    def _run(
        self,
        group: tuple[Stack, ...],
        carry: Carry,
        context: Context,
        inputs: jax.Array | None,
    ) -> Carry:
        """Run the stacks of a group in turn, period by period."""
        policy = policy_of(self.remat)
        held = {stack.name: hold_weights(self.stack(stack.name)) for stack in group}

        def layer_of(stack: Stack) -> Any:
            def run(block: DecoderLayer, carry: Carry, at: tuple[jax.Array, jax.Array]) -> Carry:
                x, states, lent = carry
                if policy is not None:
                    # Or compilers would convert what all layers keep of it at once.
                    x = jax.lax.optimization_barrier(x)
                place, number = at
                give_weights(block, held[stack.name][1], place)
                own = None if inputs is None else inputs[number]
                x, state, lent = block(x, context, states.get(stack.name), place, lent, own)
                return x, states if state is None else {**states, stack.name: state}, lent

            if policy is None:
                return run
            return nnx.remat(run, prevent_cse=False, policy=policy, graph_updates=False)

        def period(blocks: tuple[DecoderLayer, ...], carry: Carry, at: Any) -> Carry:
            for stack, block, where in zip(group, blocks, at, strict=True):
                run = layer_of(stack)
                carry = (run if stack.run == 1 else scan_layers(run))(block, carry, where)
            return carry

        blocks = tuple(by_period(held[stack.name][0], stack) for stack in group)
        found: Carry = scan_layers(period)(blocks, carry, tuple(map(places, group)))
        return found

    def _nothing_lent(self, x: jax.Array, context: Context) -> Lent:
        """Return zeros for what layers will lend, which a scan carries from its start."""
        return {
            mixer.group: context.nothing_to_attend(mixer, x)
            for mixer in (stack.layer.mixer for stack in self.stacks)
            if isinstance(mixer, Attention) and mixer.keys_of == "lends"
        }


def _make(stack: Stack, hidden: int, rngs: nnx.Rngs, **dtypes: Any) -> DecoderLayer:
    @nnx.split_rngs(splits=len(stack.numbers))
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> DecoderLayer:
        return DecoderLayer(hidden, stack.layer, rngs, **dtypes)

    made: DecoderLayer = make(rngs)
    return made
