"""Safetensors files, written whole or not at all."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from q4jax.interop.safetensors.reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class Layout(NamedTuple):
    """What a tensor will be, before there is one."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, array: Any) -> "Layout":
        """That of an array."""
        return cls(np.dtype(array.dtype), tuple(array.shape))


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    layouts: Mapping[str, Layout] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file, byte for byte as the format's own library does.

    The file appears under its name when all of it is on the disk; what had that name stays until
    then, and stays if the disk is full.

    Args:
      path: its name; the folder must be there.
      tensors: looked up one after another, so it may compute them.
      layouts: what `tensors` will return; None: looked up twice.
      metadata: texts for the header.

    Raises:
      TypeError: a dtype that the format does not have.
      OSError: the system's.
    """
    layouts = layouts or {name: Layout.of(array) for name, array in tensors.items()}
    for name, layout in layouts.items():
        if layout.dtype not in _NAMES:
            raise TypeError(f"{name}: safetensors files have no dtype {layout.dtype}")
    names = sorted(layouts, key=lambda name: (-_ORDER[layouts[name].dtype], name))
    with replacing(Path(path)) as file:
        file.write(_header(names, layouts, metadata))
        for name in names:
            array = np.asarray(tensors[name])
            if Layout.of(array) != layouts[name]:
                raise ValueError(f"{name} is {Layout.of(array)}, expected {layouts[name]}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file to write that takes the place of `path` at the end, unless something was raised."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _header(
    names: list[str], layouts: Mapping[str, Layout], metadata: Mapping[str, str] | None
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + layouts[name].nbytes
        header[name] = {
            "dtype": _NAMES[layouts[name].dtype],
            "shape": list(layouts[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
