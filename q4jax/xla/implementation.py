"""The implementation "xla": every op in plain XLA, on any platform."""

import functools
from typing import Any

import numpy as np
from jax import Array, lax

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.xla import matmul
from q4jax.xla.quantize import quantize_rows


class XLA:
    """The ops in plain XLA: in tiles on CPU, and as the reference elsewhere."""

    name = "xla"

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Return the codes and plain scales of `w`, in the spec's layout."""

        def reference(w: Array) -> tuple[Array, Array]:
            return blockwise.in_layout(w.shape, *blockwise.quantize_flat(w, spec), spec)

        def in_tiles(w: Array) -> tuple[Array, Array]:
            found = quantize_rows(w, quant_type=spec.quant_type, blocksize=spec.blocksize)
            return blockwise.in_layout(w.shape, *found, spec)

        if not spec.in_rows:
            return reference(w)
        return lax.platform_dependent(w, cpu=in_tiles, default=reference)

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales."""
        return blockwise.double_quantize(absmax)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Return the weight in its full shape."""
        return blockwise.dequantize(arrays, spec, dtype)

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """Return `x @ W.T + bias`."""
        return _product(x, arrays, bias, spec, transpose=False)

    def linear_transpose(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """Return `g @ W`."""
        return _product(g, arrays, None, spec, transpose=True)

    def is_preferred(self, op: str, dtype: np.dtype[Any], rows: int | None) -> bool:
        """Return True: it serves every call."""
        return True


def _product(
    x: Array, arrays: WeightArrays, bias: Array | None, spec: QuantSpec, *, transpose: bool
) -> Array:
    static: dict[str, Any] = {"spec": spec, "transpose": transpose}
    return lax.platform_dependent(
        x,
        arrays,
        bias,
        cpu=functools.partial(matmul.tiled, **static),
        default=functools.partial(matmul.decode_first, **static),
    )
