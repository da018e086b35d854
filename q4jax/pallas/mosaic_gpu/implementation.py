"""The implementation "mosaic_gpu": the products by Pallas kernels for Hopper alone."""

import importlib
import math

import jax
import jax.numpy as jnp
from jax import Array

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.gpu.cuda_call import kernel_call
from q4jax.gpu.products_only import ProductsOnly
from q4jax.gpu.requirements import check_devices, check_rows, check_size

_NAME = "mosaic_gpu"
_DTYPES = ("bfloat16", "float16")
_MOST_RESULTS = 2**29  # 2 GiB in float32, whose addresses 32 bits hold


class MosaicGPU(ProductsOnly):
    """The products of 16-bit activations with a weight, on GPUs of compute capability 9.0.

    It serves every quant type and block size, plain and nested scales, any M, any N that is a
    multiple of 8, and any K that is one of 128, or of 256 where x is differentiated. It needs jax
    0.11.
    """

    name = _NAME
    takes_stacks = True

    def linear(
        self,
        x: Array,
        arrays: WeightArrays | ArraysInStack,
        bias: Array | None,
        *,
        spec: QuantSpec,
    ) -> Array:
        """Return `x @ W.T + bias`."""
        self._check(spec, x, columns=128)
        if not x.shape[0]:
            return jnp.zeros((0, spec.shape[0]), x.dtype)
        kernel = importlib.import_module("q4jax.pallas.mosaic_gpu.matmul").linear
        return kernel_call(_NAME, kernel, x, arrays, bias, spec=spec)

    def linear_transpose(
        self, g: Array, arrays: WeightArrays | ArraysInStack, *, spec: QuantSpec
    ) -> Array:
        """Return `g @ W`."""
        self._check(spec, g, columns=256)
        if not g.shape[0]:
            return jnp.zeros((0, spec.shape[1]), g.dtype)
        kernel = importlib.import_module("q4jax.pallas.mosaic_gpu.matmul_transpose")
        return kernel_call(_NAME, kernel.linear_transpose, g, arrays, spec=spec)

    def _check(self, spec: QuantSpec, operand: Array, columns: int) -> None:
        if jax.__version_info__ < (0, 11):
            raise NotImplementedError(
                f"implementation={_NAME!r} needs jax 0.11; this is {jax.__version__}; 'pallas', "
                f"'xla' and None work"
            )
        check_devices(_NAME, lambda major: major == 9, "9.0 (Hopper)")
        check_rows(_NAME, spec)
        check_size(_NAME, math.prod(spec.shape) // spec.blocksize)
        n, k = spec.shape
        if n % 8 or k % columns:
            raise NotImplementedError(
                f"implementation={_NAME!r} serves weights [N, K] whose N is a multiple of 8 and K "
                f"of 128, or 256 where it is differentiated, not {spec.shape}; 'pallas', 'xla' and "
                "None work"
            )
        if operand.dtype.name not in _DTYPES:
            raise NotImplementedError(
                f"implementation={_NAME!r} multiplies in {' and '.join(_DTYPES)}, not "
                f"{operand.dtype.name}; 'pallas', 'xla' and None work"
            )
        if operand.shape[0] * max(n, k) > _MOST_RESULTS:
            raise NotImplementedError(
                f"implementation={_NAME!r} serves products of at most {_MOST_RESULTS} elements; "
                f"{operand.shape[0]} rows have {operand.shape[0] * max(n, k)}; 'pallas', 'xla' and "
                "None work"
            )
