"""Mixture of experts: a router picks a few MLPs for each token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.models.decoder.mlp import DecoderMLP
from q4jax.models.decoder.routing import route
from q4jax.models.decoder.scanned import give_weights, hold_weights
from q4jax.models.decoder.spec import Experts
from q4jax.models.decoder.without_matrices import WithoutMatrices
from q4jax.sharding.residual import whole_stack

# Larger blocks need fewer steps and more padding.
_LARGEST_BLOCK = 64


class Router(nnx.Module):
    """A projection that is never quantized, since it is no `nnx.Linear`."""

    def __init__(
        self,
        hidden: int,
        outputs: int,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        use_bias: bool = False,
    ):
        init = nnx.initializers.lecun_normal()
        self.shape = (hidden, outputs)
        self.kernel = nnx.Param(init(rngs.params(), self.shape, param_dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outputs, param_dtype))
        self.use_bias = use_bias
        self.dtype = dtype

    @property
    def adapter_axes(self) -> dict[str, KernelAxes]:
        """The matrices that may have adapters, by name."""
        return {"kernel": KernelAxes(self.shape, in_axes=(0,))}

    def __call__(self, x: jax.Array) -> jax.Array:
        """Project `x [..., hidden]` to `[..., outputs]`."""
        dtype = x.dtype if self.dtype is None else self.dtype
        y = x @ self.kernel[...].astype(dtype)
        return y + self.bias[...].astype(dtype)[None] if self.use_bias else y


class DecoderExperts(WithoutMatrices):
    """A mixture of experts: the MLPs with the highest router weights compute each token.

    The variables of `experts` are stacked: `experts.up_proj.kernel` is `[experts, in, out]`.
    """

    def __init__(self, hidden: int, spec: Experts, rngs: nnx.Rngs, **linear: Any):
        @nnx.split_rngs(splits=spec.count)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> DecoderMLP:
            return DecoderMLP(hidden, spec.expert, rngs, **linear)

        self.spec = spec
        router = Router(hidden, spec.count, rngs, use_bias=spec.router_bias, **linear)
        _put(self, spec.router, router)
        if spec.correction:
            shape = (1, spec.count) if spec.correction.startswith("moe_statics") else (spec.count,)
            _put(self, spec.correction, nnx.Param(jnp.zeros(shape, jnp.float32)))
        self.experts = stack(rngs)
        if spec.shared_mlp is not None:
            setattr(self, spec.shared, DecoderMLP(hidden, spec.shared_mlp, rngs, **linear))
            if spec.shared_gate:
                setattr(self, spec.shared_gate, Router(hidden, 1, rngs, **linear))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the experts to `x [..., hidden]`."""
        tokens, spec = x.reshape(-1, x.shape[-1]), self.spec
        correction = _get(self, spec.correction)[...] if spec.correction else None
        scores = _get(self, spec.router)(tokens).astype(jnp.float32)
        y = self._mix(tokens, *route(spec, scores, correction))
        if spec.shared_mlp is not None:
            share = getattr(self, spec.shared)(tokens)
            if spec.shared_gate:
                share = share * jax.nn.sigmoid(getattr(self, spec.shared_gate)(tokens))
            y = y + share
        return y.reshape(x.shape)

    def _mix(self, tokens: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """Return the weighted sum of the chosen experts' outputs, `[T, hidden_size]`.

        Rows (pairs of token and expert) are sorted by expert and padded to blocks of one expert
        each. A scan computes one block a step, so that only chosen experts are read.
        """
        rows, count, per_token = chosen.size, self.spec.count, self.spec.per_token
        mean = -(-rows // count)
        block = min(1 << (mean - 1).bit_length(), _LARGEST_BLOCK)
        # Each chosen expert adds less than one block of padding.
        blocks = (rows + min(count, rows) * (block - 1)) // block

        order = jnp.argsort(chosen.reshape(-1), stable=True)
        expert, token = chosen.reshape(-1)[order], order // per_token  # of each sorted row
        load = jnp.bincount(expert, length=count)
        ends = jnp.cumsum(-(-load // block))  # one past the last block of each expert
        first_block, first_row = ends - (-(-load // block)), jnp.cumsum(load) - load
        slot = first_block[expert] * block + jnp.arange(rows) - first_row[expert]
        given, factor = tokens[token], weights.reshape(-1)[order, None]
        if self.spec.score == "input":
            given, factor = given * factor.astype(given.dtype), jnp.ones_like(factor)
        laid = jnp.zeros((blocks * block, tokens.shape[-1]), tokens.dtype)
        laid = laid.at[slot].set(given).reshape(blocks, block, -1)
        owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
        owner = jnp.minimum(owner, count - 1)

        experts, held = hold_weights(self.experts)
        graphdef, state = nnx.split(experts)
        state = jax.tree.map(whole_stack, state)

        def compute(_: None, step: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            index, x = step
            mlp = nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))
            give_weights(mlp, held, index)
            return None, mlp(x)

        y = jax.lax.scan(compute, None, (owner, laid))[1].reshape(blocks * block, -1)
        parts = y[slot].astype(jnp.float32) * factor
        mixed = jnp.zeros(tokens.shape, jnp.float32).at[token].add(parts)
        return mixed.astype(tokens.dtype)


def _put(module: nnx.Module, name: str, value: Any) -> None:
    """Set an attribute by its dotted name; modules on the way are made."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            setattr(module, part, WithoutMatrices())
        module = getattr(module, part)
    setattr(module, last, value)


def _get(module: nnx.Module, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), module)
