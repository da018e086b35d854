"""What implementations have in common whose kernels are the products alone."""

from typing import Any

import numpy as np
from jax import Array

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec


class ProductsOnly:
    """An implementation of the products that is asked for by name."""

    name: str

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Raise NotImplementedError: there is no such kernel."""
        raise self._unsupported("quantize")

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales, in plain XLA."""
        return blockwise.double_quantize(absmax)

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Raise NotImplementedError: there is no such kernel."""
        raise self._unsupported("dequantize")

    def is_preferred(self, op: str, dtype: np.dtype[Any], rows: int | None) -> bool:
        """Return False: `implementation=None` never takes it."""
        return False

    def _unsupported(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"implementation={self.name!r} has the products and their gradients only; "
            f"to {what} a weight, 'pallas', 'xla' and None work"
        )
