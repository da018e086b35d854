"""Build a stacked 4-bit weight from the matrices of layers and experts, one by one."""

from typing import Any

import numpy as np

from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState
from q4jax.interop.host_arrays import aligned_empty
from q4jax.interop.placement import Placement, place_weight
from q4jax.ops.params import Params4bit

_PARTS = ("absmax", "nested_absmax", "offset")


class WeightStack:
    """Collects the arrays of a stacked weight in host memory.

    Args:
      lead: the leading axes, `(layers,)` or `(layers, experts)`; matrices are added in their order.
    """

    def __init__(self, lead: tuple[int, ...]):
        self._lead = lead
        self._count = 0
        self._spec: QuantSpec | None = None
        self._buffers: dict[str, Any] = {}

    def add(self, name: str, state: QuantState) -> np.ndarray:
        """Store the scales of the next matrix; return a uint8 array to fill with its codes.

        Args:
          name: name of the matrix, for error messages.
          state: its statistics.

        Raises:
          ValueError: its spec differs from that of the first matrix.
        """
        arrays = {part: getattr(state, part) for part in _PARTS[: 3 if state.nested else 1]}
        if self._spec is None:
            self._spec = state.spec
            shapes = {part: (array.shape, array.dtype) for part, array in arrays.items()}
            shapes["packed"] = state.spec.packed_shape, np.dtype(np.uint8)
            for part, (shape, dtype) in shapes.items():
                self._buffers[part] = aligned_empty((*self._lead, *shape), dtype)
        if state.spec != self._spec:
            raise ValueError(
                f"{name} is {state.spec.tag()}, but the same weight of layer 0 is "
                f"{self._spec.tag()}"
            )
        index: Any = (*np.unravel_index(self._count, self._lead), ...)
        self._count += 1
        for part, array in arrays.items():
            self._buffers[part][index] = np.asarray(array)
        return self._buffers["packed"][index]

    def finish(self, name: str, sharding: Placement | None) -> Params4bit:
        """Return the stacked weight, placed on its devices."""
        assert self._spec is not None
        scales = [self._buffers[part] for part in _PARTS if part in self._buffers]
        state = QuantState.tree_unflatten(self._spec, scales)
        return place_weight(name, Params4bit(self._buffers["packed"], state), sharding)
