"""The implementations "pallas" and "pallas_interpret": the compiled and interpreted kernels."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core import blockwise
from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays, in_layout
from q4jax.core.spec import QuantSpec
from q4jax.gpu import tiles
from q4jax.gpu.cuda_call import kernel_call
from q4jax.gpu.requirements import check_devices, check_rows, check_size, triton
from q4jax.pallas.tpu.implementation import PallasTPU

# Each method imports its kernel: Pallas takes longer to import than the rest of q4jax.


class Pallas:
    """The ops by the Pallas kernels for NVIDIA GPUs; in programs for TPUs, by those for TPUs.

    They serve every quant type, block size and float dtype, plain and nested scales, any M and N,
    and any K that is a multiple of the block size.

    Args:
      interpret: run the kernels in Pallas's interpreter, on any platform.
    """

    takes_stacks = True

    def __init__(self, *, interpret: bool = False):
        self.name = "pallas_interpret" if interpret else "pallas"
        self.interpret = interpret
        self._on_tpu = PallasTPU()

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Return the codes and plain scales of `w`, in the spec's layout."""
        self._check(spec, w.size)
        from q4jax.pallas.quantize import quantize

        packed, absmax = self._call(quantize, w, spec=spec)
        return in_layout(w.shape, packed, absmax, spec)

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales, in plain XLA."""
        return blockwise.double_quantize(absmax)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Return the weight in its full shape."""
        stacked = 1 if arrays.offset is None else arrays.offset.size
        self._check(spec, 2 * arrays.packed.size // stacked)
        from q4jax.pallas.dequantize import dequantize

        return self._call(dequantize, arrays, spec=spec, dtype=dtype)

    def linear(
        self,
        x: Array,
        arrays: WeightArrays | ArraysInStack,
        bias: Array | None,
        *,
        spec: QuantSpec,
    ) -> Array:
        """Return `x @ W.T + bias`."""
        self._check(spec, math.prod(spec.shape))
        if not x.shape[0]:
            return jnp.zeros((0, spec.shape[0]), x.dtype)
        from q4jax.pallas.matmul import linear

        tile = tiles.choose(x.shape[0], spec.shape, x.dtype, transpose=False)
        return self._call(linear, x, arrays, bias, spec=spec, tile=tile)

    def linear_transpose(
        self, g: Array, arrays: WeightArrays | ArraysInStack, *, spec: QuantSpec
    ) -> Array:
        """Return `g @ W`."""
        self._check(spec, math.prod(spec.shape))
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

    def _check(self, spec: QuantSpec, weights: int) -> None:
        triton(self.name)
        check_rows(self.name, spec)
        check_size(self.name, weights // spec.blocksize)

    def _call(self, kernel: Callable[..., Any], *operands: Any, **static: Any) -> Any:
        if self.interpret:
            if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
                raise NotImplementedError(
                    f"implementation={self.name!r} does not serve jax_enable_x64=True: JAX's "
                    "interpreter mixes its two types of index there"
                )
            from q4jax.pallas.inline_ptx import register_emulation

            register_emulation()
            return kernel(*operands, interpret=True, **static)
        check_devices()
        # The kernels of both are named as the methods are.
        for_tpu = {name: value for name, value in static.items() if name in ("spec", "dtype")}
        tpu = getattr(self._on_tpu, kernel.__name__), for_tpu
        return kernel_call(self.name, kernel, *operands, tpu=tpu, interpret=False, **static)
