"""Where arrays go when they are loaded: the `sharding` argument of the loaders."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

Placement = (
    Callable[[str, jax.ShapeDtypeStruct], Sharding | None] | Mapping[str, Sharding] | Sharding
)
"""A function of an array's name and shape; or shardings by name; or one for all arrays.

The arrays of a 4-bit weight are named `<weight>.packed`, `<weight>.absmax`,
`<weight>.nested_absmax` and `<weight>.offset`. None, or a name that the mapping does not have:
the default device."""


def place(name: str, array: np.ndarray | jax.Array, placement: Placement | None) -> Any:
    """The array on its device or devices; memory that nothing else writes to is not copied.

    64-bit arrays, which JAX would round to 32 bits, stay what they are unless it holds 64.
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
