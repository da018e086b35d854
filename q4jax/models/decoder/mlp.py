"""The MLP of a decoder layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.activations import ACTIVATIONS
from q4jax.models.decoder.remat import projection
from q4jax.models.decoder.spec import MLP
from q4jax.models.decoder.without_matrices import WithoutMatrices
from q4jax.sharding.residual import whole_outputs


class DecoderMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where there is no gate."""

    def __init__(self, hidden: int, spec: MLP, rngs: nnx.Rngs, **linear: Any):
        self.spec = spec
        add_projections(self, hidden, spec, rngs, **linear)
        if spec.act == "xielu":
            self.act_fn = XIELU(linear["param_dtype"])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the MLP to `x [..., hidden]`."""
        return apply_mlp(self, self.spec, x)


class XIELU(WithoutMatrices):
    """A learned activation: a parabola on the right, an exponential on the left."""

    def __init__(self, dtype: Any):
        self.alpha_p = nnx.Param(jnp.full(1, 0.55, dtype))
        self.alpha_n = nnx.Param(jnp.full(1, -0.8, dtype))
        self.beta = nnx.Param(jnp.full((), 0.5, dtype))
        self.eps = nnx.Param(jnp.full((), -1e-6, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the activation to `x [..., features]` in float32."""
        values = (self.alpha_p, self.alpha_n, self.beta, self.eps)
        right, left, beta, eps = (value[...].astype(jnp.float32).reshape(()) for value in values)
        y = x.astype(jnp.float32)
        right, left = jax.nn.softplus(right), beta + jax.nn.softplus(left)
        negative = (jnp.expm1(jnp.minimum(y, eps)) - y) * left + beta * y
        return jnp.where(y > 0, right * y * y + beta * y, negative).astype(x.dtype)


def add_projections(
    module: nnx.Module, hidden: int, spec: MLP, rngs: nnx.Rngs, **linear: Any
) -> None:
    """Give a module the projections of an MLP."""

    def project(name: str, inputs: int, outputs: int) -> None:
        layer = nnx.Linear(inputs, outputs, use_bias=spec.bias, rngs=rngs, **linear)
        setattr(module, name, layer)

    if spec.gate_up:
        project(spec.gate_up, hidden, 2 * spec.width)
    else:
        if spec.gate:
            project(spec.gate, hidden, spec.width)
        project(spec.up, hidden, spec.width)
    project(spec.down, spec.width, hidden)


def apply_mlp(module: Any, spec: MLP, x: jax.Array) -> jax.Array:
    """Apply the projections of a module to `x [..., hidden]`."""
    act = module.act_fn if spec.act == "xielu" else ACTIVATIONS[spec.act]
    if spec.gate_up:
        y = projection(getattr(module, spec.gate_up)(x))
        gate, up = (y[..., 0::2], y[..., 1::2]) if spec.interleaved else jnp.split(y, 2, axis=-1)
        h = _clamped(gate, up, spec.limit) if spec.limit is not None else act(gate) * up
    elif spec.gate:
        gate = projection(getattr(module, spec.gate)(x))
        h = act(gate) * projection(getattr(module, spec.up)(x))
    else:
        h = act(projection(getattr(module, spec.up)(x)))
    with whole_outputs():
        return projection(getattr(module, spec.down)(h))


def _clamped(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """Return gpt_oss's `(up + 1) * gate * sigmoid(1.702 gate)` of bounded inputs."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
