"""The C++ kernels as functions on arrays, for CPU only.

All raise NotImplementedError where the kernels are not in use or do not serve a layout, and
ValueError for arrays that do not fit each other.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from q4jax.core import codebooks
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
    """Compute x @ W.T + bias, accumulated in float32 and rounded once.

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
    """
    weight = _weight(packed, absmax, nested_absmax, offset, blocksize)
    bias = jnp.zeros(0, jnp.float32) if bias is None else bias
    n, k = packed.shape[0], packed.shape[1] * 2
    result = _check_rows(x, k, n, (n, k))
    return _call("q4jax_linear", [result], x, *weight, bias, **_static(quant_type, blocksize))[0]


def linear_transpose(
    g: Array,
    packed: Array,
    absmax: Array,
    nested_absmax: Array | None = None,
    offset: Array | None = None,
    *,
    quant_type: str,
    blocksize: int,
) -> Array:
    """Compute g @ W, accumulated in float32 and rounded once: the gradient of `linear`.

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
    """
    weight = _weight(packed, absmax, nested_absmax, offset, blocksize)
    no_bias = jnp.zeros(0, jnp.float32)
    n, k = packed.shape[0], packed.shape[1] * 2
    result, static = _check_rows(g, n, k, (n, k)), _static(quant_type, blocksize)
    return _call("q4jax_transposed", [result], g, *weight, no_bias, **static)[0]


def dequantize(
    packed: Array,
    absmax: Array,
    nested_absmax: Array | None = None,
    offset: Array | None = None,
    *,
    quant_type: str,
    blocksize: int,
    dtype: Any,
) -> Array:
    """Decode the weight, rounded once to `dtype`.

    Args:
      packed: as for `linear`.
      absmax: as for `linear`.
      nested_absmax: as for `linear`.
      offset: as for `linear`.
      quant_type: as for `linear`.
      blocksize: as for `linear`.
      dtype: float32, float16 or bfloat16.

    Returns:
      [N, K].
    """
    weight = _weight(packed, absmax, nested_absmax, offset, blocksize)
    shape = (packed.shape[0], packed.shape[1] * 2)
    return _call("q4jax_dequantize", [(shape, dtype)], *weight, **_static(quant_type, blocksize))[0]


def quantize(w: Array, *, quant_type: str, blocksize: int) -> tuple[Array, Array]:
    """Quantize a weight of any shape, like `blockwise.quantize_flat`.

    Args:
      w: any shape, not empty; float32, float16 or bfloat16.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale; the last block may be partial.

    Returns:
      packed: uint8 [(size + 1) // 2].
      absmax: float32 [blocks].
    """
    _require(w.size > 0, "an empty weight")
    results = [((-(-w.size // 2),), jnp.uint8), ((-(-w.size // blocksize),), jnp.float32)]
    flat = w.reshape(-1)
    packed, absmax = _call("q4jax_quantize", results, flat, **_static(quant_type, blocksize))
    return packed, absmax


def double_quantize(absmax: Array) -> tuple[Array, Array, Array]:
    """Quantize float32 scales to 8 bits, like `blockwise.double_quantize`.

    Args:
      absmax: float32, any shape, not empty.

    Returns:
      codes: uint8, in absmax's shape.
      nested_absmax: float32, one for each 256 scales.
      offset: float32 [].
    """
    _require(absmax.size > 0, "an empty weight")
    size = absmax.size
    nested = -(-size // codebooks.NESTED_BLOCKSIZE)
    results = [((size,), jnp.uint8), ((nested,), jnp.float32), ((), jnp.float32)]
    codes, nested_absmax, offset = _call("q4jax_quantize_scales", results, absmax.reshape(-1))
    return codes.reshape(absmax.shape), nested_absmax, offset


def _require(condition: bool, what: str) -> None:
    """Raise NotImplementedError where the kernels are not in use or `condition` is false."""
    status = library.status()
    if status.isa is None:
        raise NotImplementedError(f"implementation='native' is not in use: {status.reason}")
    if not condition:
        raise NotImplementedError(f"implementation='native' does not serve {what}")


def _weight(packed, absmax, nested_absmax, offset, blocksize):
    """Return a weight's operands, whose number is fixed: those of plain scales are empty."""
    _require(packed.ndim == 2, "a weight in flat layout, whose rows are not whole blocks")
    n, k = packed.shape[0], packed.shape[1] * 2
    _require(n > 0 and k > 0 and k % blocksize == 0, f"[{n}, {k}] in blocks of {blocksize}")
    if absmax.shape != (n, k // blocksize):
        raise ValueError(f"absmax must be {[n, k // blocksize]}, got {list(absmax.shape)}")
    if nested_absmax is None or offset is None:
        nested_absmax, offset = jnp.zeros(0, jnp.float32), jnp.zeros((), jnp.float32)
    return packed, absmax, nested_absmax, offset


def _check_rows(x: Array, inner: int, outer: int, weight: tuple[int, int]) -> tuple[Any, Any]:
    """Return the shape and dtype of a product; ValueError where x does not fit the weight."""
    if x.ndim != 2 or x.shape[1] != inner:
        raise ValueError(
            f"x must be [M, {inner}] for a weight of {list(weight)}, got {list(x.shape)}"
        )
    return (x.shape[0], outer), x.dtype


def _static(quant_type: str, blocksize: int) -> dict[str, np.int64]:
    number = library.quant_type_number(quant_type)
    return {"quant_type": np.int64(number), "blocksize": np.int64(blocksize)}


def _call(target: str, results: Any, *operands: Array, **static: np.int64) -> Sequence[Array]:
    """Call a kernel; inside `jax.shard_map` all operands must vary over the same axes."""
    axes: set[Any] = set().union(*(_varying(a) for a in operands))
    operands = tuple(
        lax.pcast(a, tuple(axes - _varying(a)), to="varying") if axes - _varying(a) else a
        for a in operands
    )
    manual: dict[str, Any] = {}
    if axes:
        mesh = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
        manual = {"sharding": mesh, "manual_axis_type": jax.typeof(operands[0]).mat}
    shapes = [jax.ShapeDtypeStruct(shape, dtype, **manual) for shape, dtype in results]
    return jax.ffi.ffi_call(target, shapes, vmap_method="sequential")(*operands, **static)


def _varying(array: Array) -> frozenset[Any]:
    """Return the axes of a surrounding `jax.shard_map` over which an array varies."""
    return jax.typeof(array).mat.varying
