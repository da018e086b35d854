"""`matmul_4bit`: x @ W.T for a 4-bit W, differentiable in x and bias."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax import blockwise, implementations, xla
from q4jax.params import Params4bit
from q4jax.spec import QuantSpec, float_dtype
from q4jax.state import QuantState

_FLAT_TILE_ROWS = 256


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
      TypeError: state is missing.
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
    weight = Params4bit.of(packed, state)
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
    return _matmul(implementations.resolve(implementation), x, weight, bias)


@functools.partial(jax.jit, static_argnums=0)
def _matmul(implementation: str, x: Array, weight: Params4bit, bias: Array | None) -> Array:
    y = _linear(implementation, x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(implementation: str, x: Array, weight: Params4bit, bias: Array | None) -> Array:
    """[M, K] -> [M, N] in x's dtype."""
    return _product(implementation, x, weight, bias, transpose=False)


def _linear_fwd(implementation, x, weight, bias):
    return _linear(implementation, x, weight, bias), (weight, bias)


def _linear_bwd(implementation, saved, g):
    weight, bias = saved
    dx = _transposed(implementation, g, weight)
    dbias = None if bias is None else g.sum(0, dtype=jnp.float32).astype(bias.dtype)
    return dx, None, dbias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(implementation: str, g: Array, weight: Params4bit) -> Array:
    """[M, N] -> [M, K] in g's dtype; `_linear`'s gradient, and its own gradient is `_linear`."""
    return _product(implementation, g, weight, None, transpose=True)


def _transposed_fwd(implementation, g, weight):
    return _transposed(implementation, g, weight), weight


def _transposed_bwd(implementation, weight, dx):
    return _linear(implementation, dx, weight, None), None


_linear.defvjp(_linear_fwd, _linear_bwd)
_transposed.defvjp(_transposed_fwd, _transposed_bwd)


def _product(
    implementation: str, x: Array, weight: Params4bit, bias: Array | None, *, transpose: bool
) -> Array:
    """`x @ W.T + bias`, or `x @ W` where `transpose`, in x's dtype."""
    del implementation  # one so far
    return lax.platform_dependent(
        x,
        weight,
        bias,
        cpu=functools.partial(_tiled, transpose=transpose),
        default=functools.partial(_whole, transpose=transpose),
    )


def _whole(x: Array, weight: Params4bit, bias: Array | None, *, transpose: bool) -> Array:
    """Decode the weight, then one dot."""
    return _finish(_dot(x, weight, transpose=transpose), bias, x.dtype)


def _dot(x: Array, weight: Params4bit, *, transpose: bool) -> Array:
    """The product in float32."""
    w = weight.dequantize(x.dtype)
    contract = (((1,), (0 if transpose else 1,)), ((), ()))
    return lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)


def _finish(y: Array, bias: Array | None, dtype: np.dtype[Any]) -> Array:
    """Add the bias in float32, then round once."""
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


def _tiled(x: Array, weight: Params4bit, bias: Array | None, *, transpose: bool) -> Array:
    """A part of the weight at a time, decoded and used while in cache."""
    state = weight.quant_state
    absmax = blockwise.decode_absmax(state.absmax, state.nested_absmax, state.offset)
    settings: dict[str, Any] = {"quant_type": state.quant_type, "blocksize": state.blocksize}
    if not state.spec.in_rows:
        y = _tiled_flat(x, weight.packed, absmax, state.spec, transpose=transpose)
        return _finish(y, bias, x.dtype)
    if transpose:
        return xla.transposed(x, weight.packed, absmax, **settings)
    return xla.linear(x, weight.packed, absmax, bias, **settings)


def _tiled_flat(
    x: Array, packed: Array, absmax: Array, spec: QuantSpec, *, transpose: bool
) -> Array:
    """The same, in float32, where blocks cross rows: tiles of whole rows, blocks and bytes."""
    n, k = spec.shape
    unit = math.lcm(spec.blocksize, 2 * k) // k
    rows = unit * max(1, _FLAT_TILE_ROWS // unit)

    def part(i: int | Array, size: int) -> Array:
        """The product with the `size` rows of the i-th tile."""
        tile = QuantSpec.of((size, k), spec.dtype, spec.quant_type, spec.blocksize, False)
        first_byte, first_block = i * (rows * k // 2), i * (rows * k // spec.blocksize)
        codes = lax.dynamic_slice_in_dim(packed, first_byte, tile.packed_shape[0])
        scales = lax.dynamic_slice_in_dim(absmax, first_block, tile.absmax_shape[0])
        weight = Params4bit(codes, QuantState(scales, None, None, tile))
        xs = lax.dynamic_slice_in_dim(x, i * rows, size, 1) if transpose else x
        return _dot(xs, weight, transpose=transpose)

    tiles, rest = divmod(n, rows)
    last = [part(tiles, rest)] if rest else []
    if not tiles:
        return last[0]
    indices = jnp.arange(tiles)
    if transpose:
        zero = jnp.zeros((x.shape[0], k), jnp.float32)
        total, _ = lax.scan(lambda dx, i: (dx + part(i, rows), None), zero, indices)
        return sum(last, total)
    stacked = lax.map(lambda i: part(i, rows), indices)  # [tiles, M, rows]
    full = jnp.moveaxis(stacked, 0, 1).reshape(x.shape[0], tiles * rows)
    return jnp.concatenate([full, *last], axis=1)
