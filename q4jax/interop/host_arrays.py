"""NumPy arrays in host memory, aligned so that `jax.device_put` on a CPU needs no copy."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

# JAX and XLA use a buffer at an address like this in place.
_ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return an uninitialized array that starts on a 64-byte boundary."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -buffer.ctypes.data % _ALIGNMENT
    return buffer[skip : skip + size].view(dtype).reshape(shape)


def copy_to_numpy(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copy NumPy, JAX and torch arrays to NumPy; TypeError, with the name, for anything else."""
    return {name: _copy(name, value) for name, value in arrays.items()}


def _copy(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor; numpy cannot convert its bfloat16
        torch = sys.modules["torch"]
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        value = np.asarray(value)
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise TypeError(f"{name} must hold numbers, got {array.dtype}")
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
