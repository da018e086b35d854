"""The implementation "xla": every op in plain XLA, on any platform."""

import functools
from typing import Any

import numpy as np
from jax import Array

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.xla import matmul
from q4jax.xla.by_platform import by_platform
from q4jax.xla.quantize import quantize_rows
from q4jax.xla.tpu import ops as tpu


class XLA:
    """The ops in plain XLA: in tiles on CPU, without gathers on TPU, as the reference elsewhere."""

    name = "xla"
    takes_stacks = False

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Return the codes and plain scales of `w`, in the spec's layout."""

        def reference(w: Array) -> tuple[Array, Array]:
            return blockwise.in_layout(w.shape, *blockwise.quantize_flat(w, spec), spec)

        def in_tiles(w: Array) -> tuple[Array, Array]:
            found = quantize_rows(w, quant_type=spec.quant_type, blocksize=spec.blocksize)
            return blockwise.in_layout(w.shape, *found, spec)

        return by_platform(
            w,
            cpu=in_tiles if spec.in_rows else reference,
            tpu=functools.partial(tpu.quantize, spec=spec),
            default=reference,
        )

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales."""
        return by_platform(absmax, tpu=tpu.double_quantize, default=blockwise.double_quantize)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Return the weight in its full shape."""
        static: dict[str, Any] = {"spec": spec, "dtype": dtype}
        return by_platform(
            arrays,
            tpu=functools.partial(tpu.dequantize, **static),
            default=functools.partial(blockwise.dequantize, **static),
        )

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """Return `x @ W.T + bias`."""
        return by_platform(
            x,
            arrays,
            bias,
            cpu=functools.partial(matmul.tiled, spec=spec, transpose=False),
            tpu=functools.partial(tpu.linear, spec=spec),
            default=functools.partial(matmul.decode_first, spec=spec, transpose=False),
        )

    def linear_transpose(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """Return `g @ W`."""
        return by_platform(
            g,
            arrays,
            cpu=functools.partial(matmul.tiled, bias=None, spec=spec, transpose=True),
            tpu=functools.partial(tpu.linear_transpose, spec=spec),
            default=functools.partial(matmul.decode_first, bias=None, spec=spec, transpose=True),
        )

    def is_preferred(self, op: str, dtype: np.dtype[Any], rows: int | None) -> bool:
        """Return True: it serves every call."""
        return True
