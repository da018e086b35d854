"""The kernels as functions on arrays, for CPU only."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from q4jax import codebooks
from q4jax.native import library


def linear(
    x: Array,
    packed: Array,
    absmax: Array,
    nested_absmax: Array | None = None,
    offset: Array | None = None,
    bias: Array | None = None,
    *,
    quant_type: str,
    blocksize: int,
) -> Array:
    """x @ W.T + bias, accumulated in float32 and rounded once.

    Args:
      x: [M, K], float32, float16 or bfloat16.
      packed: uint8 [N, K/2].
      absmax: float32 [N, K/blocksize]; with double quantization uint8 codes of them.
      nested_absmax: float32, one for each 256 scales; None where scales are plain.
      offset: float32 []; None where scales are plain.
      bias: [N], any of these dtypes, or None.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; divides K.

    Returns:
      [M, N] in x's dtype.

    Raises:
      NotImplementedError: the kernels are not in use, or K is not whole blocks.
      ValueError: arrays that do not fit each other.
    """
    return _product(x, packed, absmax, nested_absmax, offset, bias, quant_type, blocksize, False)


def transposed(
    g: Array,
    packed: Array,
    absmax: Array,
    nested_absmax: Array | None = None,
    offset: Array | None = None,
    *,
    quant_type: str,
    blocksize: int,
) -> Array:
    """g @ W, accumulated in float32 and rounded once: `linear`'s gradient with respect to x.

    Args:
      g: [M, N], float32, float16 or bfloat16.
      packed: as for `linear`.
      absmax: as for `linear`.
      nested_absmax: as for `linear`.
      offset: as for `linear`.
      quant_type: as for `linear`.
      blocksize: as for `linear`.

    Returns:
      [M, K] in g's dtype.

    Raises:
      NotImplementedError: as for `linear`.
      ValueError: as for `linear`.
    """
    return _product(g, packed, absmax, nested_absmax, offset, None, quant_type, blocksize, True)


def quantize(w: Array, *, quant_type: str, blocksize: int) -> tuple[Array, Array]:
    """Codes and plain scales of a whole weight, as `blockwise.quantize_flat` has them.

    Args:
      w: any shape, not empty; float32, float16 or bfloat16.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; the last block may be partial.

    Returns:
      packed: uint8 [(size + 1) // 2].
      absmax: float32 [blocks].

    Raises:
      NotImplementedError: the kernels are not in use, or w is empty.
    """
    _require(w.size > 0, "an empty weight")
    shapes = (
        jax.ShapeDtypeStruct((-(-w.size // 2),), jnp.uint8),
        jax.ShapeDtypeStruct((-(-w.size // blocksize),), jnp.float32),
    )
    call = _call("q4jax_quantize", shapes, **_attributes(quant_type, blocksize))
    return call(w.reshape(-1))


def quantize_scales(absmax: Array) -> tuple[Array, Array, Array]:
    """Double quantization of float32 scales, as `blockwise.finish` has it.

    Args:
      absmax: float32, any shape, not empty.

    Returns:
      codes: uint8, in absmax's shape.
      nested_absmax: float32, one for each 256 scales.
      offset: float32 [].

    Raises:
      NotImplementedError: the kernels are not in use, or absmax is empty.
    """
    _require(absmax.size > 0, "an empty weight")
    shapes = (
        jax.ShapeDtypeStruct((absmax.size,), jnp.uint8),
        jax.ShapeDtypeStruct((-(-absmax.size // codebooks.NESTED_BLOCKSIZE),), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    codes, nested_absmax, offset = _call("q4jax_quantize_scales", shapes)(absmax.reshape(-1))
    return codes.reshape(absmax.shape), nested_absmax, offset


def _require(condition: bool, what: str) -> None:
    """NotImplementedError where the kernels are not in use or the condition does not hold."""
    status = library.status()
    if status.isa is None:
        raise NotImplementedError(f"implementation='native' is not in use: {status.reason}")
    if not condition:
        raise NotImplementedError(f"implementation='native' does not serve {what}")


def _attributes(quant_type: str, blocksize: int) -> dict[str, np.int64]:
    number = codebooks.QUANT_TYPES.index(quant_type)
    return {"quant_type": np.int64(number), "blocksize": np.int64(blocksize)}


def _call(target: str, shapes: Any, **attributes: Any) -> Callable[..., Any]:
    return functools.partial(
        jax.ffi.ffi_call(target, shapes, vmap_method="sequential"), **attributes
    )


def _product(x, packed, absmax, nested_absmax, offset, bias, quant_type, blocksize, transpose):
    n, k = packed.shape[0], packed.shape[1] * 2
    _require(n > 0 and k > 0 and k % blocksize == 0, f"{k} columns in blocks of {blocksize}")
    width = n if transpose else k
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"x must be [M, {width}] for a weight of [{n}, {k}], got {list(x.shape)}")
    if absmax.shape != (n, k // blocksize):
        raise ValueError(f"absmax must be {[n, k // blocksize]}, got {list(absmax.shape)}")
    # An operand that is not there is empty: the call has a fixed number of them.
    empty = jnp.zeros(0, jnp.float32)
    operands = (
        x,
        packed,
        absmax,
        empty if nested_absmax is None else nested_absmax,
        jnp.zeros((), jnp.float32) if offset is None else offset,
        empty if bias is None else bias,
    )
    target = "q4jax_transposed" if transpose else "q4jax_linear"
    return _rows(target, quant_type, blocksize)(*operands)


@functools.cache
def _rows(target: str, quant_type: str, blocksize: int) -> Callable[..., Array]:
    """The product; where only x is batched by `vmap`, its batch becomes rows."""

    @custom_vmap
    def product(x, packed, *rest):
        width = packed.shape[0] if target == "q4jax_linear" else packed.shape[1] * 2
        shape = jax.ShapeDtypeStruct((x.shape[0], width), x.dtype)
        return _call(target, shape, **_attributes(quant_type, blocksize))(x, packed, *rest)

    @product.def_vmap
    def batched(size, is_batched, x, *rest):
        if not any(is_batched[1:]):
            y = product(x.reshape(-1, x.shape[-1]), *rest)
            return y.reshape(*x.shape[:-1], y.shape[-1]), True
        operands = (x, *rest)

        def one(i):
            return product(*(a[i] if b else a for a, b in zip(operands, is_batched, strict=True)))

        return lax.map(one, jnp.arange(size)), True

    return product
