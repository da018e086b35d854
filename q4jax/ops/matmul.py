"""`matmul_4bit`: x @ W.T for a 4-bit W, differentiable in x and bias; its ops and its VJP."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from q4jax.core.spec import float_dtype
from q4jax.core.state import QuantState
from q4jax.ops.registry import Implementation, check_name
from q4jax.ops.weight_in_stack import Weight, from_owner, local_operand, weight_axes
from q4jax.ops.weight_of_stack import weight_operand
from q4jax.ops.weight_op import WeightOp
from q4jax.sharding.axes import REPLICATED, AxisLabels, ExplicitSharding, batch_labels
from q4jax.sharding.op import Shard
from q4jax.sharding.partition import run
from q4jax.sharding.residual import outputs_are_whole

if TYPE_CHECKING:
    from q4jax.ops.params import Params4bit
    from q4jax.ops.weight_of_stack import WeightOfStack


def matmul_4bit(
    x: Array,
    packed: "Array | Params4bit | WeightOfStack",
    state: QuantState | None = None,
    bias: Array | None = None,
    *,
    implementation: str | None = None,
) -> Array:
    """Compute `x @ W.T + bias`, without W in memory where the platform allows it.

    W is decoded in float32 and rounded once to x's dtype; products are accumulated in float32,
    the bias is added in float32, and the sum is rounded once. The backward pass uses the same
    rounded W, so it is the gradient of what was computed; it saves nothing of the weight but its
    codes and scales. The gradient to scales is 0, and there is no forward mode: `jax.jvp` and
    `jax.jacfwd` raise a TypeError.

    Args:
      x: `[..., in]`, float32, float16 or bfloat16: its dtype is the compute dtype.
      packed: uint8 codes of a 2-D weight `[out, in]`, or a `Params4bit` for both arguments.
        Experts and stacked layers go through `jax.vmap`, `jax.lax.scan` or `weight_of_stack`.
      state: their state.
      bias: float `[out]`, or None.
      implementation: None (best for the platform), "xla", "pallas", "pallas_interpret",
        "pallas_tpu_interpret", "mosaic_gpu", "triton" or "native". A named one that cannot serve
        the call raises.

    Returns:
      `[..., out]` in x's dtype.

    Raises:
      ValueError: x or bias has the wrong width or dtype; the weight is not 2-D; codes that are
        not uint8 or do not fit the state.
      TypeError: state is missing, or x is a 4-bit weight.
      NotImplementedError: the named implementation cannot serve the call.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> w = jax.random.normal(jax.random.key(0), (128, 256))
      >>> packed, state = q4jax.quantize_4bit(w, quant_type="nf4")
      >>> x = jnp.ones((3, 5, 256), jnp.bfloat16)
      >>> y = q4jax.matmul_4bit(x, packed, state, bias=jnp.zeros(128))
      >>> y.shape, y.dtype.name
      ((3, 5, 128), 'bfloat16')
    """
    if hasattr(x, "quant_state"):
        raise TypeError(f"matmul_4bit(x, weight): x is the weight, {x!r}; swap the two")
    weight, spec, shape = weight_operand(packed, state)
    if len(shape) != 2:
        raise ValueError(f"matmul_4bit: quant_state.shape must be 2D [N, K], got {list(shape)}")
    n, k = shape
    float_dtype(getattr(x, "dtype", type(x).__name__), "x.dtype")
    if not x.ndim or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}] for a weight of [{n}, {k}], got {list(x.shape)}")
    if bias is not None:
        float_dtype(getattr(bias, "dtype", type(bias).__name__), "bias.dtype")
        if bias.shape != (n,):
            raise ValueError(f"bias must be [{n}] for a weight of [{n}, {k}], got {bias.shape}")
    op = Linear(spec, check_name(implementation), outputs_are_whole())
    return _linear_jit(op, x, weight, bias)


def in_compute_dtype(x: Array, dtype: DTypeLike | None) -> Array:
    """Return a layer's input in `dtype`; None: in its own, or in float32 where that is float64."""
    x = jnp.asarray(x, dtype)
    return x.astype(jnp.float32) if dtype is None and x.dtype == jnp.float64 else x


@dataclasses.dataclass(frozen=True)
class Linear(WeightOp):
    """`x @ W.T + bias`: operands `(x [..., K], weight, bias [N] or None)`, result `[..., N]`.

    Attributes:
      gather_outputs: whether to all-gather the result's features where the weight's output axis
        is sharded.
    """

    name, contraction, weight_operand, extra_rows = "linear", "in", 1, True
    gather_outputs: bool

    def axes(
        self, x: Array, weight: Weight, bias: Array | None
    ) -> tuple[Any, tuple[AxisLabels, ...]]:
        """Label x, the weight, the bias and the result."""
        (rows, columns), labels = weight_axes(self.spec, weight)
        batch = batch_labels(x.shape[:-1])
        operands = (*batch, columns), labels, None if bias is None else (rows,)
        return operands, ((*batch, REPLICATED if self.gather_outputs else rows),)

    def profile(self, x: Array, *weight: Any) -> tuple[np.dtype[Any], int | None]:
        """The dtype and the rows of x."""
        return _profile(x)

    def compute(
        self,
        shard: Shard,
        implementation: Implementation,
        x: Array,
        weight: Weight,
        bias: Array | None,
    ) -> tuple[Array, ...]:
        """Multiply by this device's part of the weight, and sum or gather what is sharded."""
        arrays, spec = local_operand(shard, weight, self.spec, implementation.takes_stacks)
        summed = bool(shard.axes("in"))
        rows = x.reshape(-1, x.shape[-1])
        y = implementation.linear(rows, arrays, None if summed else bias, spec=spec)
        y = shard.sum(y, "in")
        if summed and bias is not None:  # once, not in each part
            y = (y.astype(jnp.float32) + bias[None].astype(jnp.float32)).astype(y.dtype)
        y = from_owner(shard, weight, y)
        if self.gather_outputs and shard.axes("out"):
            y = lax.all_gather(y, shard.axes("out"), axis=1, tiled=True)
        return (y.reshape(*x.shape[:-1], y.shape[-1]),)


@dataclasses.dataclass(frozen=True)
class LinearTranspose(WeightOp):
    """`g @ W`, the transpose of `Linear`: operands `(g [..., N], weight)`, result `[..., K]`.

    Attributes:
      gather_outputs: that of the `Linear`.
    """

    name, contraction, weight_operand, extra_rows = "linear_transpose", "out", 1, True
    gather_outputs: bool

    def axes(self, g: Array, weight: Weight) -> tuple[Any, tuple[AxisLabels, ...]]:
        """Label g, the weight and the result."""
        (rows, columns), labels = weight_axes(self.spec, weight)
        batch = batch_labels(g.shape[:-1])
        return ((*batch, rows), labels), ((*batch, columns),)

    def profile(self, g: Array, weight: Weight) -> tuple[np.dtype[Any], int | None]:
        """The dtype and the rows of g."""
        return _profile(g)

    def compute(
        self, shard: Shard, implementation: Implementation, g: Array, weight: Weight
    ) -> tuple[Array, ...]:
        """Multiply by this device's part of the weight, and sum over the parts."""
        arrays, spec = local_operand(shard, weight, self.spec, implementation.takes_stacks)
        dx = implementation.linear_transpose(g.reshape(-1, g.shape[-1]), arrays, spec=spec)
        dx = from_owner(shard, weight, shard.sum(dx, "out"))
        return (dx.reshape(*g.shape[:-1], dx.shape[-1]),)


def _profile(activation: Array) -> tuple[np.dtype[Any], int]:
    return activation.dtype, activation.size // activation.shape[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(op: Linear, x: Array, weight: Weight, bias: Array | None) -> Array:
    return run(op, x, weight, bias)[0]


def _linear_fwd(op, x, weight, bias):
    return _linear(op, x, weight, bias), (ExplicitSharding.from_array(x), weight, bias)


def _linear_bwd(op, saved, g):
    sharding, weight, bias = saved
    transpose = LinearTranspose(op.spec, op.implementation, op.gather_outputs)
    dx = sharding.apply(_linear_transpose(transpose, g, weight))
    if bias is None:
        return dx, None, None
    dbias = g.sum(range(g.ndim - 1), dtype=jnp.float32).astype(bias.dtype)
    return dx, None, ExplicitSharding.from_array(bias).apply(dbias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_transpose(op: LinearTranspose, g: Array, weight: Weight) -> Array:
    return run(op, g, weight)[0]


def _linear_transpose_fwd(op, g, weight):
    return _linear_transpose(op, g, weight), (ExplicitSharding.from_array(g), weight)


def _linear_transpose_bwd(op, saved, dx):
    sharding, weight = saved
    linear = Linear(op.spec, op.implementation, op.gather_outputs)
    return sharding.apply(_linear(linear, dx, weight, None)), None


_linear.defvjp(_linear_fwd, _linear_bwd)
_linear_transpose.defvjp(_linear_transpose_fwd, _linear_transpose_bwd)
_linear_jit = jax.jit(_linear, static_argnums=0)
