"""The implementations "pallas" and "pallas_interpret": the compiled and interpreted kernels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays, in_layout
from q4jax.core.spec import QuantSpec
from q4jax.gpu import tiles
from q4jax.gpu.cuda_call import kernel_call
from q4jax.gpu.requirements import check_devices, check_rows, triton

# Each method imports its kernel: Pallas takes longer to import than the rest of q4jax.


class Pallas:
    """The ops by the Pallas kernels.

    They serve every quant type, block size and float dtype, plain and nested scales, any M and N,
    and any K that is a multiple of the block size.

    Args:
      interpret: run the kernels in Pallas's interpreter, on any platform.
    """

    def __init__(self, *, interpret: bool = False):
        self.name = "pallas_interpret" if interpret else "pallas"
        self.interpret = interpret

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Return the codes and plain scales of `w`, in the spec's layout."""
        self._check(spec)
        from q4jax.pallas.quantize import quantize

        packed, absmax = self._call(quantize, w, spec=spec)
        return in_layout(w.shape, packed, absmax, spec)

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales, in plain XLA."""
        return blockwise.double_quantize(absmax)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Return the weight in its full shape."""
        self._check(spec)
        from q4jax.pallas.dequantize import dequantize

        return self._call(dequantize, arrays, spec=spec, dtype=dtype)

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """Return `x @ W.T + bias`."""
        self._check(spec)
        if not x.shape[0]:
            return jnp.zeros((0, spec.shape[0]), x.dtype)
        from q4jax.pallas.matmul import linear

        tile = tiles.choose(x.shape[0], spec.shape, x.dtype, transpose=False)
        return self._call(linear, x, arrays, bias, spec=spec, tile=tile)

    def linear_transpose(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """Return `g @ W`."""
        self._check(spec)
        if not g.shape[0]:
            return jnp.zeros((0, spec.shape[1]), g.dtype)
        from q4jax.pallas.matmul_transpose import linear_transpose

        tile = tiles.choose(g.shape[0], spec.shape, g.dtype, transpose=True)
        return self._call(linear_transpose, g, arrays, spec=spec, tile=tile)

    def is_preferred(self, op: str, dtype: np.dtype[Any], rows: int | None) -> bool:
        """Return whether the kernels are verified on this GPU, and faster than a dense product."""
        kinds = {device.device_kind for device in jax.devices() if device.platform == "gpu"}
        if not kinds or not kinds <= set(tiles.verified()):
            return False
        return rows is None or rows <= tiles.crossover(op, dtype)

    def _check(self, spec: QuantSpec) -> None:
        triton(self.name)
        check_rows(self.name, spec)

    def _call(self, kernel: Callable[..., Any], *operands: Any, **static: Any) -> Any:
        if self.interpret:
            from q4jax.pallas.inline_ptx import register_emulation

            register_emulation()
            return kernel(*operands, interpret=True, **static)
        check_devices()
        return kernel_call(self.name, kernel, *operands, interpret=False, **static)
