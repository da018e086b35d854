"""The implementations of the ops by name, and those that `implementation=None` tries.

To add an implementation, write a package with a class that has the methods of `Implementation`
and add an instance to `IMPLEMENTATIONS`. Add it to `AUTOMATIC` too if `implementation=None` may
choose it. `tests/implementations/test_contract.py` then tests it.
"""

from typing import Any, Protocol

import numpy as np
from jax import Array

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.native.implementation import Native
from q4jax.pallas.implementation import Pallas
from q4jax.pallas.mosaic_gpu.implementation import MosaicGPU
from q4jax.pallas.tpu.implementation import PallasTPU
from q4jax.triton.implementation import Triton
from q4jax.xla.implementation import XLA


class Implementation(Protocol):
    """An implementation of the ops on the arrays of one device.

    Each method raises NotImplementedError, with the reason in one line, for a call that it cannot
    serve.

    Attributes:
      name: the value of `implementation=` that selects it.
      takes_stacks: whether the `arrays` of its products may be an `ArraysInStack` in the place of
        `WeightArrays`.
    """

    name: str
    takes_stacks: bool

    def quantize(self, w: Array, *, spec: QuantSpec) -> tuple[Array, Array]:
        """Return the codes and plain scales of `w`, in the spec's layout."""
        ...

    def double_quantize(self, absmax: Array) -> tuple[Array, Array, Array]:
        """Return the 8-bit codes, nested scales and offset of plain scales of any shape."""
        ...

    def dequantize(self, arrays: WeightArrays, *, spec: QuantSpec, dtype: np.dtype[Any]) -> Array:
        """Return the weight in its full shape, rounded once to `dtype`."""
        ...

    def linear(self, x: Array, arrays: Any, bias: Array | None, *, spec: QuantSpec) -> Array:
        """Return `x @ W.T + bias` for `x [M, K]`: `[M, N]` in x's dtype."""
        ...

    def linear_transpose(self, g: Array, arrays: Any, *, spec: QuantSpec) -> Array:
        """Return `g @ W` for `g [M, N]`: `[M, K]` in g's dtype."""
        ...

    def is_preferred(self, op: str, dtype: np.dtype[Any], rows: int | None) -> bool:
        """Return whether `implementation=None` should take it for an op.

        Args:
          op: the op's name.
          dtype: dtype of the activation or of the weight.
          rows: rows of the activation; None for ops without one.
        """
        ...


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        XLA(),
        Pallas(),
        Pallas(interpret=True),
        PallasTPU(interpret=True),
        MosaicGPU(),
        Triton(),
        Native(),
    )
}
"""Name -> the implementation that `implementation=` selects."""

AUTOMATIC: dict[str, tuple[Implementation, ...]] = {
    "cpu": (IMPLEMENTATIONS["native"],),
    "cuda": (IMPLEMENTATIONS["pallas"],),
}
"""Platform -> what `implementation=None` tries there, in this order, before "xla"."""


def check_name(name: str | None) -> Implementation | None:
    """Return the implementation with this name; None stands for the best of each platform.

    Raises:
      ValueError: there is no such implementation.
    """
    if name is None:
        return None
    if name not in IMPLEMENTATIONS:
        allowed = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation must be None or one of {allowed}; got {name!r}")
    return IMPLEMENTATIONS[name]


def takes_stacks(name: str | None) -> bool:
    """Return whether a product by this implementation should be given its weight in a stack.

    For None, that is where a kernel which takes stacks may be chosen; it cuts the weight out where
    none is chosen in the end.
    """
    if name is not None:
        found = check_name(name)
        return found is not None and found.takes_stacks
    return any(
        implementation.takes_stacks
        and implementation.is_preferred("linear", np.dtype(np.float32), None)
        for candidates in AUTOMATIC.values()
        for implementation in candidates
    )
