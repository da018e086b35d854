"""The ops by the TPU kernels: "pallas" in programs for TPUs, "pallas_tpu_interpret" anywhere."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from q4jax.core import blockwise
from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays, in_layout
from q4jax.core.spec import QuantSpec
from q4jax.gpu.requirements import check_rows
from q4jax.pallas.tpu import requirements

# Each method imports its kernel: Pallas takes longer to import than the rest of q4jax.


class PallasTPU:
    """The ops by the Pallas kernels for TPUs, v5e and newer.

    They serve every quant type and block size, plain and nested scales, any M and N, and any K
    that is a multiple of the block size. Weights are quantized from and decoded to every dtype;
    products are in bfloat16 and float32.

    Args:
      interpret: True: simulate the kernels by XLA, on any platform; `pltpu.InterpretParams`:
        simulate a TPU's memories too, where no `custom_partitioning` surrounds the call.

    Attributes:
      name: the value of `implementation=` that selects it.
    """

    takes_stacks = True

    def __init__(self, *, interpret: Any = False):
        self.name = "pallas_tpu_interpret" if interpret else "pallas"
        self.interpret = interpret

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Return the codes and plain scales of `w`, in the spec's layout."""
        self._check(spec)
        from q4jax.pallas.tpu.quantize import quantize

        packed, absmax = quantize(w, spec=spec, interpret=self.interpret)
        return in_layout(w.shape, packed, absmax, spec)

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales, in plain XLA."""
        return blockwise.double_quantize(absmax)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Return the weight in its full shape."""
        self._check(spec)
        from q4jax.pallas.tpu.dequantize import dequantize

        return dequantize(arrays, spec=spec, dtype=dtype, interpret=self.interpret)

    def linear(
        self,
        x: Array,
        arrays: WeightArrays | ArraysInStack,
        bias: Array | None,
        *,
        spec: QuantSpec,
    ) -> Array:
        """Return `x @ W.T + bias`."""
        self._check(spec)
        requirements.check_dtype(self.name, x.dtype)
        if not x.shape[0]:
            return jnp.zeros((0, spec.shape[0]), x.dtype)
        from q4jax.pallas.tpu.matmul import linear

        weights, layer = _flat(arrays)
        return linear(x, weights, bias, layer, spec=spec, interpret=self.interpret)

    def linear_transpose(
        self, g: Array, arrays: WeightArrays | ArraysInStack, *, spec: QuantSpec
    ) -> Array:
        """Return `g @ W`."""
        self._check(spec)
        requirements.check_dtype(self.name, g.dtype)
        if not g.shape[0]:
            return jnp.zeros((0, spec.shape[1]), g.dtype)
        from q4jax.pallas.tpu.matmul_transpose import linear_transpose

        weights, layer = _flat(arrays)
        return linear_transpose(g, weights, layer, spec=spec, interpret=self.interpret)

    def is_preferred(self, op: str, dtype: np.dtype[Any], rows: int | None) -> bool:
        """Return False: the kernels have not run on a TPU."""
        return False

    def _check(self, spec: QuantSpec) -> None:
        check_rows(self.name, spec)
        requirements.check_x64(self.name)
        requirements.check_pallas(self.name)
        if not self.interpret:
            requirements.check_libtpu(self.name)
            requirements.check_chip(self.name)


def _flat(arrays: WeightArrays | ArraysInStack) -> tuple[WeightArrays, Array | None]:
    return arrays.flat() if isinstance(arrays, ArraysInStack) else (arrays, None)
