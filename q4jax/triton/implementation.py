"""The implementation "triton": the products by kernels in official Triton."""

import importlib
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.gpu.cuda_call import kernel_call
from q4jax.gpu.products_only import ProductsOnly
from q4jax.gpu.requirements import check_rows, check_size
from q4jax.triton.requirements import check

# Of the up to 256 rows of a tile, the first has a 64-bit address, to which the kernels add.
_LONGEST_AXIS = 2**31 // 256 - 256


class Triton(ProductsOnly):
    """The products by the Triton kernels.

    They serve every quant type, block size and float dtype, plain and nested scales, any M and N,
    and any K that is a multiple of the block size. They need a jax-triton that works and, when the
    program is lowered, CUDA.
    """

    name = "triton"
    takes_stacks = False

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """Return `x @ W.T + bias`."""
        self._check(spec)
        if not x.shape[0]:
            return jnp.zeros((0, spec.shape[0]), x.dtype)
        return kernel_call("triton", _launch().linear, x, arrays, bias, spec=spec)

    def linear_transpose(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """Return `g @ W`."""
        self._check(spec)
        if not g.shape[0]:
            return jnp.zeros((0, spec.shape[1]), g.dtype)
        return kernel_call("triton", _launch().linear_transpose, g, arrays, spec=spec)

    def _check(self, spec: QuantSpec) -> None:
        check()
        check_rows("triton", spec)
        check_size("triton", math.prod(spec.shape) // spec.blocksize)
        if max(spec.shape) > _LONGEST_AXIS:
            raise NotImplementedError(
                f"implementation='triton' serves weights of at most {_LONGEST_AXIS} rows and "
                f"columns, not {spec.shape}: 32 bits hold a tile's addresses; 'xla' and None work"
            )


def _launch() -> Any:
    """The module that imports jax-triton, which may be missing."""
    return importlib.import_module("q4jax.triton.launch")
