"""One layer of a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.activations import ACTIVATIONS
from q4jax.models.decoder.attention import DecoderAttention, Lent
from q4jax.models.decoder.context import Context
from q4jax.models.decoder.delta_net import DecoderDeltaNet
from q4jax.models.decoder.experts import DecoderExperts
from q4jax.models.decoder.kv_cache import States
from q4jax.models.decoder.latent_attention import DecoderLatentAttention
from q4jax.models.decoder.mixer_spec import Attention, DeltaNet, LatentAttention
from q4jax.models.decoder.mlp import DecoderMLP, add_projections, apply_mlp
from q4jax.models.decoder.norm import DecoderNorm
from q4jax.models.decoder.spec import MLP, Experts, Layer
from q4jax.models.decoder.without_matrices import WithoutMatrices
from q4jax.sharding.residual import whole_features

_MIXERS: dict[type, Any] = {
    Attention: DecoderAttention,
    LatentAttention: DecoderLatentAttention,
    DeltaNet: DecoderDeltaNet,
}


class DecoderLayer(WithoutMatrices):
    """A layer that mixes tokens and then applies an MLP, each with a residual sum."""

    def __init__(self, hidden: int, spec: Layer, rngs: nnx.Rngs, **linear: Any):
        self.spec = spec
        for name in (spec.before_mixer, spec.after_mixer, spec.before_mlp, spec.after_mlp):
            if name:
                setattr(self, name, DecoderNorm(hidden, spec.norm))
        mixer = _MIXERS[type(spec.mixer)](hidden, spec.mixer, rngs, **linear)
        setattr(self, spec.mixer_name, mixer)
        if isinstance(spec.mlp, Experts):
            setattr(self, spec.mlp_name, DecoderExperts(hidden, spec.mlp, rngs, **linear))
        elif spec.mlp_name:
            setattr(self, spec.mlp_name, DecoderMLP(hidden, spec.mlp, rngs, **linear))
        else:
            add_projections(self, hidden, spec.mlp, rngs, **linear)
        if spec.per_layer:
            width = spec.per_layer
            no_bias = {"use_bias": False, "rngs": rngs, **linear}
            self.per_layer_input_gate = nnx.Linear(hidden, width, **no_bias)
            self.per_layer_projection = nnx.Linear(width, hidden, **no_bias)
            self.post_per_layer_input_norm = DecoderNorm(hidden, spec.norm)
        if spec.scaled:
            self.layer_scalar = nnx.Param(jnp.ones(1, linear["param_dtype"]))

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        state: States | None,
        layer: jax.Array,
        lent: Lent,
        inputs: jax.Array | None,
    ) -> tuple[jax.Array, States | None, Lent]:
        """Apply the layer to `x [B, T, hidden]`.

        Args:
          x: the residual stream.
          context: where the tokens stand.
          state: that of the layers of the stack, or None.
          layer: int32, the layer's place in the stack.
          lent: keys and values that layers lend.
          inputs: `[B, T, width]`, the layer's own inputs, or None.
        """
        spec = self.spec
        # Features are unsharded at the ends of each block, whatever the weights' sharding.
        h = whole_features(self._norm(spec.before_mixer, x))
        y, state, lent = getattr(self, spec.mixer_name)(h, context, state, layer, lent)
        y = self._norm(spec.after_mixer, whole_features(y))
        if spec.parallel:
            other = whole_features(self._norm(spec.before_mlp, x)) if spec.before_mlp else h
            return whole_features(x + y + whole_features(self._mlp(other))), state, lent
        x = whole_features(x + _scaled(y, spec.residual))
        h = whole_features(self._norm(spec.before_mlp, x))
        y = self._norm(spec.after_mlp, whole_features(self._mlp(h)))
        x = whole_features(x + _scaled(y, spec.residual))
        if inputs is not None:
            gate = ACTIVATIONS[spec.per_layer_act](self.per_layer_input_gate(x))
            y = self.per_layer_projection(gate * inputs.astype(gate.dtype))
            x = whole_features(x + self.post_per_layer_input_norm(y))
        if spec.scaled:
            x = x * self.layer_scalar[0].astype(x.dtype)
        return x, state, lent

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return getattr(self, name)(x) if name else x

    def _mlp(self, x: jax.Array) -> jax.Array:
        if self.spec.mlp_name:
            return getattr(self, self.spec.mlp_name)(x)
        assert isinstance(self.spec.mlp, MLP)
        return apply_mlp(self, self.spec.mlp, x)


def _scaled(y: jax.Array, factor: float) -> jax.Array:
    return y if factor == 1.0 else y * jnp.asarray(factor, y.dtype)
