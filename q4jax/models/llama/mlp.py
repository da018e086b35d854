"""The MLP of a decoder layer."""

from typing import Any

import jax
from flax import nnx

from q4jax.models.llama.config import LlamaConfig
from q4jax.sharding.residual import whole_outputs


class LlamaMLP(nnx.Module):
    """A SwiGLU MLP: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, width: int, rngs: nnx.Rngs, **linear: Any):
        linear |= {"use_bias": config.mlp_bias, "rngs": rngs}
        self.gate_proj = nnx.Linear(config.hidden_size, width, **linear)
        self.up_proj = nnx.Linear(config.hidden_size, width, **linear)
        self.down_proj = nnx.Linear(width, config.hidden_size, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the MLP to `x [..., hidden_size]`."""
        h = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        with whole_outputs():
            return self.down_proj(h)
