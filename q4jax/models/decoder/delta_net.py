"""Gated delta net: linear attention whose state has a fixed size."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.attention import Lent
from q4jax.models.decoder.context import Context
from q4jax.models.decoder.kv_cache import States
from q4jax.models.decoder.mixer_spec import DeltaNet
from q4jax.models.decoder.norm import DecoderNorm, broadcast_to_rank
from q4jax.models.decoder.without_matrices import WithoutMatrices
from q4jax.sharding.residual import whole_outputs


class DepthwiseConv(WithoutMatrices):
    """The weights of a convolution over time, `[channels, 1, taps]`."""

    def __init__(self, channels: int, taps: int, rngs: nnx.Rngs, dtype: Any):
        init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=0)
        self.weight = nnx.Param(init(rngs.params(), (channels, 1, taps), dtype))


class DecoderDeltaNet(WithoutMatrices):
    """The linear attention of Qwen3-Next and Qwen3.5, computed token by token."""

    def __init__(
        self, hidden: int, spec: DeltaNet, rngs: nnx.Rngs, *, dtype: Any, param_dtype: Any
    ):
        self.spec = spec
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim

        def project(inputs: int, outputs: int) -> nnx.Linear:
            dtypes = {"dtype": dtype, "param_dtype": param_dtype}
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs, **dtypes)

        if spec.fused:
            self.in_proj_qkvz = project(hidden, 2 * (keys + values))
            self.in_proj_ba = project(hidden, 2 * spec.value_heads)
        else:
            self.in_proj_qkv = project(hidden, 2 * keys + values)
            self.in_proj_z = project(hidden, values)
            self.in_proj_b = project(hidden, spec.value_heads)
            self.in_proj_a = project(hidden, spec.value_heads)
        self.conv1d = DepthwiseConv(2 * keys + values, spec.kernel, rngs, param_dtype)
        self.A_log = nnx.Param(jnp.zeros(spec.value_heads, jnp.float32))
        self.dt_bias = nnx.Param(jnp.ones(spec.value_heads, jnp.float32))
        self.norm = DecoderNorm(spec.value_dim, spec.norm)
        self.out_proj = project(values, hidden)

    def __call__(
        self, x: jax.Array, context: Context, state: States | None, layer: jax.Array, lent: Lent
    ) -> tuple[jax.Array, States | None, Lent]:
        """Apply the layer to `x [B, T, hidden]`; arguments as in `DecoderAttention`."""
        spec, (batch, tokens) = self.spec, x.shape[:2]
        mixed, z, b, a = self._inputs(jnp.where(context.real[..., None], x, 0))
        taps = jnp.zeros((batch, spec.kernel - 1, mixed.shape[-1]), mixed.dtype)
        memory = jnp.zeros((batch, spec.value_heads, spec.key_dim, spec.value_dim), jnp.float32)
        if state is not None:
            taps, memory = state["taps"][layer], state["state"][layer]
        mixed, taps = self._convolve(mixed, taps, context)
        keys = spec.key_heads * spec.key_dim
        q, k, v = jnp.split(jax.nn.silu(mixed).astype(jnp.float32), [keys, 2 * keys], axis=-1)
        repeats = spec.value_heads // spec.key_heads

        def unit(y: jax.Array) -> jax.Array:
            y = y.reshape(batch, tokens, spec.key_heads, spec.key_dim)
            y = y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)
            return jnp.repeat(y, repeats, axis=2)

        q, k = unit(q) * jnp.float32(spec.key_dim**-0.5), unit(k)
        v = v.reshape(batch, tokens, spec.value_heads, spec.value_dim)
        rate, shift = (
            broadcast_to_rank(v[...].astype(jnp.float32), 3) for v in (self.A_log, self.dt_bias)
        )
        decay = jnp.exp(-jnp.exp(rate) * jax.nn.softplus(a.astype(jnp.float32) + shift))
        beta = jax.nn.sigmoid(b.astype(jnp.float32))
        # Padding leaves the state as it is, and a document starts without one.
        real = context.real[..., None]
        decay, beta = jnp.where(real, decay, 1.0), jnp.where(real, beta, 0.0)
        if context.sequences.segments is not None:
            decay = jnp.where((context.ranks == 0)[..., None] & real, 0.0, decay)
        memory, y = delta_rule(memory, q, k, v, decay, beta)
        y = self.norm(y) * jax.nn.silu(z.astype(jnp.float32))
        if state is not None:
            state = {
                "taps": state["taps"].at[layer].set(taps.astype(state["taps"].dtype)),
                "state": state["state"].at[layer].set(memory),
            }
        with whole_outputs():
            return self.out_proj(y.astype(x.dtype).reshape(batch, tokens, -1)), state, lent

    def _inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values in a row, the output's gate, and the state's two."""
        spec, (batch, tokens) = self.spec, x.shape[:2]
        heads = (batch, tokens, spec.value_heads)
        if not spec.fused:
            z = self.in_proj_z(x).reshape(*heads, spec.value_dim)
            return self.in_proj_qkv(x), z, self.in_proj_b(x), self.in_proj_a(x)
        dim, own = spec.key_dim, spec.value_heads // spec.key_heads * spec.value_dim
        y = self.in_proj_qkvz(x).reshape(batch, tokens, spec.key_heads, -1)
        q, k, v, z = jnp.split(y, [dim, 2 * dim, 2 * dim + own], axis=-1)
        gates = self.in_proj_ba(x).reshape(batch, tokens, spec.key_heads, -1)
        b, a = jnp.split(gates, 2, axis=-1)
        mixed = jnp.concatenate([p.reshape(batch, tokens, -1) for p in (q, k, v)], axis=-1)
        return mixed, z.reshape(*heads, spec.value_dim), b.reshape(heads), a.reshape(heads)

    def _convolve(
        self, x: jax.Array, taps: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """Return the convolution of `x [B, T, C]` with its own past, and the last inputs."""
        weights, count = self.conv1d.weight[...].astype(x.dtype), self.spec.kernel
        tokens = x.shape[1]
        past = jnp.concatenate([taps.astype(x.dtype), x], axis=1)
        segments = context.sequences.segments
        y = jnp.zeros_like(x)
        for tap in range(count):
            part = past[:, tap : tap + tokens]
            distance = count - 1 - tap
            if segments is not None and distance:
                earlier = jnp.pad(segments, ((0, 0), (distance, 0)), constant_values=-1)
                same = earlier[:, :tokens] == segments
                part = jnp.where(same[..., None], part, 0)
            y = y + part * weights[None, None, :, 0, tap]
        return y, past[:, tokens:]


def delta_rule(
    memory: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Update a memory token by token, and read it.

    Args:
      memory: float32 `[B, heads, key_dim, value_dim]`.
      q: float32 `[B, T, heads, key_dim]`.
      k: of the same shape.
      v: float32 `[B, T, heads, value_dim]`.
      decay: float32 `[B, T, heads]`, the share of the memory that stays.
      beta: float32 `[B, T, heads]`, the share of a value that is written.

    Returns:
      The memory after the last token, and `[B, T, heads, value_dim]`.
    """

    def step(memory: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        q, k, v, decay, beta = token
        memory = memory * decay[..., None, None]
        new = (v - jnp.einsum("bhkv,bhk->bhv", memory, k)) * beta[..., None]
        memory = memory + k[..., None] * new[..., None, :]
        return memory, jnp.einsum("bhkv,bhk->bhv", memory, q)

    by_token = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, k, v, decay, beta))
    memory, y = jax.lax.scan(step, memory, by_token)
    return memory, jnp.moveaxis(y, 0, 1)
