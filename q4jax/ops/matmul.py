"""`matmul_4bit`: x @ W.T for a 4-bit W, differentiable in x and bias."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from q4jax.core.spec import float_dtype
from q4jax.core.state import QuantState
from q4jax.ops import registry as implementations
from q4jax.ops.params import Params4bit, as_params4bit
from q4jax.ops.weight_sharding import Operation
from q4jax.sharding import partition
from q4jax.sharding.partition import Lies
from q4jax.sharding.residual import outputs_are_whole


def matmul_4bit(
    x: Array,
    packed: Array | Params4bit,
    state: QuantState | None = None,
    bias: Array | None = None,
    *,
    implementation: str | None = None,
) -> Array:
    """`x @ W.T + bias`, without W in memory where the platform allows it.

    W is decoded in float32 and rounded once to x's dtype; products are accumulated in float32,
    the bias is added in float32, and the sum is rounded once. The backward pass uses the same
    rounded W, so it is the gradient of what was computed; it saves nothing of the weight but its
    codes and scales. There is no gradient to codes or scales, and no forward mode: `jax.jvp` and
    `jax.jacfwd` raise a TypeError.

    Args:
      x: `[..., in]`, float32, float16 or bfloat16: its dtype is the compute dtype.
      packed: uint8 codes of a 2-D weight `[out, in]`, or a `Params4bit` for both arguments.
        Experts and stacked layers go through `jax.vmap` or `jax.lax.scan`.
      state: their state.
      bias: float `[out]`, or None.
      implementation: None (best for the platform), "xla", "pallas", "pallas_interpret", "triton"
        or "native". A named one that cannot serve the call raises.

    Returns:
      `[..., out]` in x's dtype.

    Raises:
      ValueError: x or bias has the wrong width or dtype; the weight is not 2-D; codes that are
        not uint8 or do not fit the state.
      TypeError: state is missing, or x is a 4-bit weight.
      NotImplementedError: the named implementation cannot serve the call.

    Example:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> w = jax.random.normal(jax.random.key(0), (128, 256))
      >>> packed, state = q4jax.quantize_4bit(w, quant_type="nf4")
      >>> x = jnp.ones((3, 5, 256), jnp.bfloat16)
      >>> y = q4jax.matmul_4bit(x, packed, state, bias=jnp.zeros(128))
      >>> y.shape, y.dtype.name
      ((3, 5, 128), 'bfloat16')
    """
    if isinstance(x, Params4bit):
        raise TypeError(f"matmul_4bit(x, weight): x is the weight, {x!r}; swap the two")
    weight = as_params4bit(packed, state)
    shape = weight.quant_state.shape
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
    how = _How(implementations.resolve(implementation), outputs_are_whole())
    return _matmul(how, x, weight, bias)


class _How(NamedTuple):
    """What is static in a product."""

    implementation: str | None
    whole: bool  # as in `Operation`


@functools.partial(jax.jit, static_argnums=0)
def _matmul(how: _How, x: Array, weight: Params4bit, bias: Array | None) -> Array:
    return _linear(how, x, weight, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(how: _How, x: Array, weight: Params4bit, bias: Array | None) -> Array:
    """[..., K] -> [..., N] in x's dtype."""
    operation = Operation("linear", how.implementation, weight.quant_state.spec, whole=how.whole)
    return partition.run(operation, x, weight.arrays, bias)[0]


def _linear_fwd(how, x, weight, bias):
    return _linear(how, x, weight, bias), (Lies.of(x), weight, bias)


def _linear_bwd(how, saved, g):
    lies, weight, bias = saved
    dx = lies.place(_transposed(how, g, weight))
    if bias is None:
        return dx, None, None
    dbias = g.sum(range(g.ndim - 1), dtype=jnp.float32).astype(bias.dtype)
    return dx, None, Lies.of(bias).place(dbias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(how: _How, g: Array, weight: Params4bit) -> Array:
    """[..., N] -> [..., K] in g's dtype: `_linear`'s gradient; its own gradient is `_linear`."""
    operation = Operation("transposed", how.implementation, weight.quant_state.spec)
    return partition.run(operation, g, weight.arrays)[0]


def _transposed_fwd(how, g, weight):
    return _transposed(how, g, weight), (Lies.of(g), weight)


def _transposed_bwd(how, saved, dx):
    lies, weight = saved
    return lies.place(_linear(how, dx, weight, None)), None


_linear.defvjp(_linear_fwd, _linear_bwd)
_transposed.defvjp(_transposed_fwd, _transposed_bwd)
