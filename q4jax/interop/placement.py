"""Where loaded arrays are placed: the `sharding` argument of the loaders."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Sharding

from q4jax.core.state import QuantState
from q4jax.ops.params import Params4bit

Placement = (
    Callable[[str, jax.ShapeDtypeStruct], Sharding | Format | None]
    | Mapping[str, Sharding | Format]
    | Sharding
)
"""A function from an array's name and shape to its sharding, a mapping from names, or one sharding.

A `jax.experimental.layout.Format` in the place of a sharding gives the layout in memory too.

The arrays of a 4-bit weight are named `<weight>.packed`, `<weight>.absmax`,
`<weight>.nested_absmax` and `<weight>.offset`. An array goes to the default device where the
function returns None or the mapping lacks its name."""


def place(name: str, array: np.ndarray | jax.Array, placement: Placement | None) -> Any:
    """Return the array on its devices, without a copy where the default device is the host.

    64-bit arrays stay NumPy arrays unless `jax_enable_x64` is set, since JAX would round them.
    """
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    if placement is None and isinstance(array, jax.Array):
        return array
    if placement is None or isinstance(placement, Sharding):
        return jax.device_put(array, placement)
    if isinstance(placement, Mapping):
        return jax.device_put(array, placement.get(name))
    return jax.device_put(array, placement(name, jax.ShapeDtypeStruct(array.shape, array.dtype)))


def place_weight(name: str, weight: Params4bit, placement: Placement | None) -> Params4bit:
    """Return a 4-bit weight with its codes and statistics on their devices."""
    state = weight.quant_state
    parts = ("absmax", "nested_absmax", "offset")[: 3 if state.nested else 1]
    arrays = [place(f"{name}.{part}", getattr(state, part), placement) for part in parts]
    packed = place(f"{name}.packed", weight.packed, placement)
    return Params4bit(packed, QuantState.tree_unflatten(state.spec, arrays))
