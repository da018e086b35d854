"""What the kernels serve, and how a call becomes a kernel."""

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.gpu.cuda_call import kernel_call
from q4jax.gpu.requirements import check_rows
from q4jax.triton import requirements as backend

_NOT_HERE = (
    "implementation='triton' has the products and their gradients only; "
    "to {} a weight, 'pallas', 'xla' and None work"
)


def quantize(w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
    """NotImplementedError: it is not part of this implementation."""
    raise NotImplementedError(_NOT_HERE.format("quantize"))


def dequantize(arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
    """NotImplementedError: it is not part of this implementation."""
    raise NotImplementedError(_NOT_HERE.format("dequantize"))


def linear(x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec) -> Array:
    """`x @ W.T + bias`: [M, K] -> [M, N] in x's dtype.

    Served are nf4 and fp4, every block size, every float dtype, plain and nested scales, any M and
    N, and any K that is a multiple of the block size.

    Raises:
      NotImplementedError: another K, or no jax-triton that works; when the program is lowered, a
        platform other than CUDA.
    """
    return _product("linear", spec, x, arrays, bias)


def transposed(g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
    """`g @ W`: [M, N] -> [M, K] in g's dtype; as `linear`."""
    return _product("transposed", spec, g, arrays)


def _product(operation: str, spec: QuantSpec, x: Array, *weight: Any) -> Array:
    backend.check()
    check_rows("triton", spec)
    if not x.shape[0]:
        return jnp.zeros((0, spec.shape[operation == "transposed"]), x.dtype)
    launch = importlib.import_module("q4jax.triton.launch")
    return kernel_call("triton", getattr(launch, operation), x, *weight, spec=spec)
