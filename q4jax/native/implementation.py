"""The implementation "native": the ops by the C++ kernels, on CPU."""

import functools
import importlib.resources
import json
from typing import Any

import numpy as np
from jax import Array

from q4jax.core.blockwise import WeightArrays, in_layout
from q4jax.core.spec import QuantSpec
from q4jax.native import calls, library


class Native:
    """The ops by the C++ kernels.

    Each raises NotImplementedError for a weight whose rows are not whole blocks (`quantize` serves
    these too), and where the kernels are not in use.
    """

    name = "native"
    takes_stacks = False

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Return the codes and plain scales of `w`, in the spec's layout."""
        packed, absmax = calls.quantize(w, quant_type=spec.quant_type, blocksize=spec.blocksize)
        return in_layout(w.shape, packed, absmax, spec)

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales."""
        return calls.double_quantize(absmax)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Return the weight in its full shape."""
        if not spec.in_rows or (arrays.offset is not None and arrays.offset.ndim):
            raise NotImplementedError(f"implementation='native' does not serve {spec.tag()}")
        rows = arrays._replace(
            packed=arrays.packed.reshape(-1, arrays.packed.shape[-1]),
            absmax=arrays.absmax.reshape(-1, arrays.absmax.shape[-1]),
        )
        static: dict[str, Any] = {"quant_type": spec.quant_type, "blocksize": spec.blocksize}
        w = calls.dequantize(*rows, **static, dtype=dtype)
        return w.reshape(*arrays.packed.shape[:-1], w.shape[-1])

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """Return `x @ W.T + bias`."""
        return calls.linear(x, *arrays, bias, quant_type=spec.quant_type, blocksize=spec.blocksize)

    def linear_transpose(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """Return `g @ W`."""
        static: dict[str, Any] = {"quant_type": spec.quant_type, "blocksize": spec.blocksize}
        return calls.linear_transpose(g, *arrays, **static)

    def is_preferred(self, op: str, dtype: np.dtype[Any], rows: int | None) -> bool:
        """Return whether tuning.json says that the kernels are faster than XLA."""
        isa = library.status().isa
        if isa is None:
            return False
        most_rows = _table().get(isa, {}).get(op, {}).get(np.dtype(dtype).name, -1)
        return most_rows is None or (most_rows >= 0 and (rows or 0) <= most_rows)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int | None]]]:
    """ISA -> op -> dtype -> the most rows for which the kernels are faster; null for any number."""
    return json.loads(importlib.resources.files(__package__).joinpath("tuning.json").read_text())
