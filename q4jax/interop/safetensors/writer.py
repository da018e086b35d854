"""An atomic writer of safetensors files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from q4jax.interop.files import atomic_write
from q4jax.interop.safetensors.reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    layouts: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, byte for byte as the format's own library does.

    The file replaces the one at `path` only after all of it is on disk.

    Args:
      path: the file; its folder must exist.
      tensors: arrays by name. The mapping may compute each one when it is looked up.
      layouts: dtype and shape of each tensor, to avoid a second lookup; None: looked up.
      metadata: texts by name for the header.

    Raises:
      TypeError: the format does not have the dtype of a tensor.
      OSError: from the file system.
    """
    layouts = layouts or {name: _layout(array) for name, array in tensors.items()}
    for name, layout in layouts.items():
        if layout.dtype not in _NAMES:
            raise TypeError(f"{name}: safetensors files have no dtype {layout.dtype}")
    names = sorted(layouts, key=lambda name: (-_ORDER[layouts[name].dtype], name))
    with atomic_write(Path(path)) as file:
        file.write(_header(names, layouts, metadata))
        for name in names:
            array = np.asarray(tensors[name])
            if _layout(array) != layouts[name]:
                raise ValueError(f"{name} is {_layout(array)}, expected {layouts[name]}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _layout(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(array.shape), np.dtype(array.dtype))


def _header(
    names: list[str],
    layouts: Mapping[str, jax.ShapeDtypeStruct],
    metadata: Mapping[str, str] | None,
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        layout = layouts[name]
        start, end = end, end + layout.size * layout.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
