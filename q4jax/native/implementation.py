"""The implementation "native": the operations by the CPU kernels.

`always` serves whatever the kernels can; `where_faster` only what measured faster than XLA, by
table.json, and is what `implementation=None` takes on CPU.
"""

import functools
import importlib.resources
import json
from typing import Any

import numpy as np
from jax import Array

from q4jax.core.blockwise import WeightArrays, in_layout
from q4jax.core.spec import QuantSpec
from q4jax.native import calls as ops
from q4jax.native import library


class Always:
    """The operations as `q4jax.implementations` describes them.

    Raises:
      NotImplementedError: each of them, for a weight whose rows are not whole blocks (`quantize`
        serves these too), and where the kernels are not in use.
    """

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Codes and plain scales, in the spec's layout."""
        self._check("quantize", w.dtype, None)
        packed, absmax = ops.quantize(w, quant_type=spec.quant_type, blocksize=spec.blocksize)
        return in_layout(w.shape, packed, absmax, spec)

    def compress(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Double quantization: codes of the scales, one scale for each 256 of them, the offset."""
        self._check("compress", absmax.dtype, None)
        return ops.quantize_scales(absmax)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """The weight in its full shape."""
        self._check("dequantize", dtype, None)
        if not spec.in_rows or (arrays.offset is not None and arrays.offset.ndim):
            raise NotImplementedError(f"implementation='native' does not serve {spec.tag()}")
        rows = arrays._replace(
            packed=arrays.packed.reshape(-1, arrays.packed.shape[-1]),
            absmax=arrays.absmax.reshape(-1, arrays.absmax.shape[-1]),
        )
        w = ops.dequantize(*rows, quant_type=spec.quant_type, blocksize=spec.blocksize, dtype=dtype)
        return w.reshape(*arrays.packed.shape[:-1], w.shape[-1])

    def linear(
        self, x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec
    ) -> Array:
        """`x @ W.T + bias`: [M, K] -> [M, N] in x's dtype."""
        self._check("linear", x.dtype, x.shape[0])
        return ops.linear(x, *arrays, bias, quant_type=spec.quant_type, blocksize=spec.blocksize)

    def transposed(self, g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
        """`g @ W`: [M, N] -> [M, K] in g's dtype."""
        self._check("transposed", g.dtype, g.shape[0])
        return ops.transposed(g, *arrays, quant_type=spec.quant_type, blocksize=spec.blocksize)

    def _check(self, operation: str, dtype: Any, m: int | None) -> None:
        """Nothing to refuse beyond what the kernels cannot do."""


class WhereFaster(Always):
    """The same, with NotImplementedError where XLA is faster."""

    def _check(self, operation: str, dtype: Any, m: int | None) -> None:
        isa = library.status().isa
        if isa is None:
            return  # the operation says why
        largest = _table().get(isa, {}).get(operation, {}).get(np.dtype(dtype).name, -1)
        if largest is not None and (largest < 0 or (m or 0) > largest):
            raise NotImplementedError(f"XLA is faster at {operation} with {isa}")


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int | None]]]:
    """isa -> operation -> dtype -> largest M that it is faster for; null: for any."""
    return json.loads(importlib.resources.files(__package__).joinpath("tuning.json").read_text())


always = Always()
where_faster = WhereFaster()
