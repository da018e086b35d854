"""What follows the attention: one MLP, or experts of which a router picks a few for each token."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from q4jax.models.llama.config import ExpertsConfig, LlamaConfig
from q4jax.sharding.residual import whole_outputs

# Rows of a block: more are less padding's worth of calls, and more padding.
_LARGEST_BLOCK = 64


class LlamaMLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, width: int, rngs: nnx.Rngs, **linear: Any):
        linear |= {"use_bias": config.mlp_bias, "rngs": rngs}
        self.gate_proj = nnx.Linear(config.hidden_size, width, **linear)
        self.up_proj = nnx.Linear(config.hidden_size, width, **linear)
        self.down_proj = nnx.Linear(width, config.hidden_size, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., hidden_size]` to the same shape."""
        h = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        with whole_outputs():
            return self.down_proj(h)


class LlamaRouter(nnx.Module):
    """A small projection that decides and so stays dense: no `nnx.Linear`, which is quantized."""

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
        """`x [..., hidden_size]` to `[..., outputs]`."""
        return x @ self.kernel[...].astype(x.dtype if self.dtype is None else self.dtype)


class LlamaExperts(nnx.Module):
    """A mixture of experts: each token goes through the MLPs that the router weighs highest.

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
        """`x [..., hidden_size]` to the same shape."""
        tokens = x.reshape(-1, x.shape[-1])
        y = self._mix(tokens, *self.route(tokens))
        if self.shared:
            share = jax.nn.sigmoid(self.shared_expert_gate(tokens))
            y = y + share * self.shared_expert(tokens)
        return y.reshape(x.shape)

    def route(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of each token and their weights, int32 and float32 `[T, per_token]`."""
        probability = jax.nn.softmax(self.gate(tokens).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probability, self.per_token)
        if self.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return chosen, weights

    def _mix(self, tokens: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """The weighted sum of what the chosen experts make of each token, `[T, hidden_size]`.

        Rows (a token for one of its experts) are sorted by expert and laid out in blocks of one
        expert each, the last block of each padded; a scan computes block by block and so reads only
        the experts that were chosen, whatever their loads.
        """
        rows = chosen.size
        mean = -(-rows // self.count)
        block = min(1 << (mean - 1).bit_length(), _LARGEST_BLOCK)
        # Each expert that is chosen pads less than a block.
        blocks = (rows + min(self.count, rows) * (block - 1)) // block

        order = jnp.argsort(chosen.reshape(-1), stable=True)
        expert, token = chosen.reshape(-1)[order], order // self.per_token  # of the sorted rows
        load = jnp.bincount(expert, length=self.count)
        ends = jnp.cumsum(-(-load // block))  # the block after the last one of each expert
        first_block, first_row = ends - (-(-load // block)), jnp.cumsum(load) - load
        place = first_block[expert] * block + jnp.arange(rows) - first_row[expert]
        laid = jnp.zeros((blocks * block, tokens.shape[-1]), tokens.dtype)
        laid = laid.at[place].set(tokens[token]).reshape(blocks, block, -1)
        owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
        owner = jnp.minimum(owner, self.count - 1)

        graphdef, state = nnx.split(self.experts)

        def compute(_: None, step: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            index, x = step
            mlp = nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))
            return None, mlp(x)

        y = jax.lax.scan(compute, None, (owner, laid))[1].reshape(blocks * block, -1)
        parts = y[place].astype(jnp.float32) * weights.reshape(-1)[order, None]
        mixed = jnp.zeros(tokens.shape, jnp.float32).at[token].add(parts)
        return mixed.astype(tokens.dtype)
