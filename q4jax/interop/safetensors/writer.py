"""A writer of safetensors files that the reader reads."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from q4jax.disk import whole_file
from q4jax.interop.safetensors.reader import DTYPES, MAX_HEADER, parse_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class FilePlan(NamedTuple):
    """What a file will hold: its header, and dtype and shape of its tensors in their order."""

    header: bytes
    layouts: dict[str, jax.ShapeDtypeStruct]

    def write(self, file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the file; ValueError if a tensor is not as planned."""
        file.write(self.header)
        for name, layout in self.layouts.items():
            array = np.asarray(tensors[name])
            if layout_of(array) != layout:
                raise ValueError(f"{name} is {layout_of(array)}, expected {layout}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def plan_file(
    layouts: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str] | None = None
) -> FilePlan:
    """Plan a file of tensors; raises as `write_file` does, for all that `TensorFile` refuses."""
    texts = dict(metadata or {})
    for key, value in texts.items():
        if not _is_text(key) or not _is_text(value):
            raise ValueError(f"metadata must hold texts by name, got {key!r}: {value!r}")
    for name, layout in layouts.items():
        if not _is_text(name) or name == _METADATA:
            raise ValueError(f"{name!r} is no name of a tensor in a safetensors file")
        if layout.dtype not in _NAMES:
            raise TypeError(f"{name}: safetensors files have no dtype {layout.dtype}")
    names = sorted(layouts, key=lambda name: (-_ORDER[layouts[name].dtype], name))
    header = _header(names, layouts, texts)
    size = 8 + len(header) + sum(_nbytes(layout) for layout in layouts.values())
    if len(header) > MAX_HEADER:
        raise ValueError(f"the header would have {len(header)} bytes, {MAX_HEADER} are allowed")
    parse_header(header, size)
    length = len(header).to_bytes(8, "little")
    return FilePlan(length + header, {name: layouts[name] for name in names})


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    layouts: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    metadata: Mapping[str, str] | None = None,
    replace: bool = True,
) -> None:
    """Write one safetensors file, byte for byte as the format's own library does.

    The file replaces the one at `path`, whose permissions it gets, only after all of it is on disk.
    A link at `path` is replaced, and not the file that it points to.

    Args:
      path: the file; its folder must exist.
      tensors: arrays by name. The mapping may compute each one when it is looked up.
      layouts: dtype and shape of each tensor, to avoid a second lookup; None: looked up.
      metadata: texts by name for the header.
      replace: whether a file at `path` is replaced.

    Raises:
      TypeError: the format does not have the dtype of a tensor.
      ValueError: `TensorFile` would refuse the file: metadata that is not text, a tensor named
        `__metadata__`, a name of more than 4,096 characters, more than 32 axes.
      FileExistsError: another thread or process is writing the file; it may not be replaced, or is
        no regular file.
      OSError: from the file system; what was at `path` is unchanged.
    """
    plan = plan_file(layouts or {n: layout_of(array) for n, array in tensors.items()}, metadata)
    with whole_file(Path(path), replace=replace) as file:
        plan.write(file, tensors)


def layout_of(array: Any) -> jax.ShapeDtypeStruct:
    """Return dtype and shape of an array."""
    return jax.ShapeDtypeStruct(tuple(array.shape), np.dtype(array.dtype))


def _nbytes(layout: jax.ShapeDtypeStruct) -> int:
    return layout.size * layout.dtype.itemsize


def _is_text(value: Any) -> bool:
    """Return whether this is a text that UTF-8 can hold."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _header(
    names: list[str], layouts: Mapping[str, jax.ShapeDtypeStruct], metadata: dict[str, str]
) -> bytes:
    header: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    end = 0
    for name in names:
        layout = layouts[name]
        start, end = end, end + _nbytes(layout)
        header[name] = {
            "dtype": _NAMES[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
