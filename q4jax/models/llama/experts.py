"""Mixture of experts: a router picks a few MLPs for each token."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from q4jax.models.llama.config import ExpertsConfig, LlamaConfig
from q4jax.models.llama.mlp import LlamaMLP

# Larger blocks need fewer steps and more padding.
_LARGEST_BLOCK = 64


class LlamaRouter(nnx.Module):
    """A projection that is never quantized, since it is no `nnx.Linear`."""

    def __init__(
        self,
        config: LlamaConfig,
        outputs: int,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
    ):
        shape = (config.hidden_size, outputs)
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Project `x [..., hidden_size]` to `[..., outputs]`."""
        return x @ self.kernel[...].astype(x.dtype if self.dtype is None else self.dtype)


class LlamaExperts(nnx.Module):
    """A mixture of experts: the MLPs with the highest router weights compute each token.

    The variables of `experts` are stacked: `experts.up_proj.kernel` is `[num_experts, in, out]`.
    """

    def __init__(self, config: LlamaConfig, experts: ExpertsConfig, rngs: nnx.Rngs, **linear: Any):
        @nnx.split_rngs(splits=experts.num_experts)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> LlamaMLP:
            return LlamaMLP(config, experts.intermediate_size, rngs, **linear)

        self.count = experts.num_experts
        self.per_token = experts.num_experts_per_tok
        self.normalize = experts.norm_topk_prob
        self.gate = LlamaRouter(config, experts.num_experts, rngs, **linear)
        self.experts = stack(rngs)
        self.shared = experts.shared_intermediate_size is not None
        if experts.shared_intermediate_size is not None:
            self.shared_expert = LlamaMLP(config, experts.shared_intermediate_size, rngs, **linear)
            self.shared_expert_gate = LlamaRouter(config, 1, rngs, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the experts to `x [..., hidden_size]`."""
        tokens = x.reshape(-1, x.shape[-1])
        y = self._mix(tokens, *self.route(tokens))
        if self.shared:
            share = jax.nn.sigmoid(self.shared_expert_gate(tokens))
            y = y + share * self.shared_expert(tokens)
        return y.reshape(x.shape)

    def route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the experts of each token, int32 `[T, per_token]`, and their float32 weights."""
        probability = jax.nn.softmax(self.gate(tokens).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probability, self.per_token)
        if self.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return chosen, weights

    def _mix(self, tokens: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """Return the weighted sum of the chosen experts' outputs, `[T, hidden_size]`.

        Rows (pairs of token and expert) are sorted by expert and padded to blocks of one expert
        each. A scan computes one block a step, so that only chosen experts are read.
        """
        rows = chosen.size
        mean = -(-rows // self.count)
        block = min(1 << (mean - 1).bit_length(), _LARGEST_BLOCK)
        # Each chosen expert adds less than one block of padding.
        blocks = (rows + min(self.count, rows) * (block - 1)) // block

        order = jnp.argsort(chosen.reshape(-1), stable=True)
        expert, token = chosen.reshape(-1)[order], order // self.per_token  # of each sorted row
        load = jnp.bincount(expert, length=self.count)
        ends = jnp.cumsum(-(-load // block))  # one past the last block of each expert
        first_block, first_row = ends - (-(-load // block)), jnp.cumsum(load) - load
        slot = first_block[expert] * block + jnp.arange(rows) - first_row[expert]
        laid = jnp.zeros((blocks * block, tokens.shape[-1]), tokens.dtype)
        laid = laid.at[slot].set(tokens[token]).reshape(blocks, block, -1)
        owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
        owner = jnp.minimum(owner, self.count - 1)

        graphdef, state = nnx.split(self.experts)

        def compute(_: None, step: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            index, x = step
            mlp = nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))
            return None, mlp(x)

        y = jax.lax.scan(compute, None, (owner, laid))[1].reshape(blocks * block, -1)
        parts = y[slot].astype(jnp.float32) * weights.reshape(-1)[order, None]
        mixed = jnp.zeros(tokens.shape, jnp.float32).at[token].add(parts)
        return mixed.astype(tokens.dtype)
