"""A strict reader of safetensors files: the header is validated before any tensor is read."""

import math
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from q4jax.interop.files import decode_json
from q4jax.interop.host_arrays import aligned_empty

# Some systems refuse to read 2 GB at once.
_AT_ONCE = 2**30
# The format's own limit.
MAX_HEADER = 100_000_000
_MAX_AXES, _MAX_NAME = 32, 4096
_LARGEST = 2**63 - 1

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
"""Dtypes of the format, in ascending order of its own writer's sort."""


class Entry(NamedTuple):
    """Dtype and shape of one tensor, and its byte range in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.stop - self.start


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file by name, each read into new memory when looked up.

    Creating it reads the header only. Arrays start on a 64-byte boundary, so `jax.device_put` on a
    CPU does not copy them.

    Args:
      path: a regular file, or a link to one.
      hold: whether the file stays open, so that all tensors are of one file though another takes
        its place. If False, such a change is an error on the next lookup.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file violates the format. Its header is too long, is not JSON or repeats a
        key, or its tensors leave a gap, overlap or do not end with the file. On a lookup: the file
        has changed since it was opened.

    Examples:
      >>> import tempfile, numpy as np
      >>> from q4jax.interop.safetensors import TensorFile, write_file
      >>> path = tempfile.mkdtemp() + "/x.safetensors"
      >>> write_file(path, {"a": np.arange(3)})
      >>> TensorFile(path)["a"]
      array([0, 1, 2])
    """

    def __init__(self, path: str | os.PathLike[str], *, hold: bool = True):
        self.path = Path(path)
        try:
            # Checked before opening, since opening a pipe waits for a writer.
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise ValueError(f"{self.path} is not a regular file")
        except ValueError as error:  # also raised by stat for a zero byte in the name
            raise ValueError(str(error)) from None
        descriptor = _open(self.path)
        try:
            self._identity = _identity(descriptor)
            size = self._identity[-1]
            length = int.from_bytes(self._read(descriptor, 0, 8), "little") if size >= 8 else -1
            if not 0 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(
                    f"{self.path} is not a safetensors file: {size} bytes cannot hold a header of "
                    f"{length}"
                )
            text = self._read(descriptor, 8, length)
            try:
                self.metadata, self.entries = parse_header(text, size)
            except ValueError as error:
                raise ValueError(f"{self.path} has a malformed header: {error}") from None
        except BaseException:
            os.close(descriptor)
            raise
        self._held = descriptor if hold else None
        if hold:
            weakref.finalize(self, os.close, descriptor)
        else:
            os.close(descriptor)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        array = aligned_empty(entry.shape, entry.dtype)
        self.read_into(name, array)
        return array

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read the bytes of a tensor into `out`, a contiguous array of the same size."""
        entry = self.entries[name]
        if out.nbytes != entry.nbytes or not out.flags.c_contiguous:
            raise ValueError(f"{name} takes {entry.nbytes} contiguous bytes, out has {out.nbytes}")
        if not entry.nbytes:
            return
        descriptor = _open(self.path) if self._held is None else self._held
        try:
            if _identity(descriptor) != self._identity:
                raise ValueError(f"{self.path} was changed while it was read")
            _read_into(descriptor, entry.start, out.reshape(-1).view(np.uint8), self.path)
        finally:
            if self._held is None:
                os.close(descriptor)

    def _read(self, descriptor: int, start: int, count: int) -> bytes:
        buffer = np.empty(count, np.uint8)
        _read_into(descriptor, start, buffer, self.path)
        return buffer.tobytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def parse_header(text: bytes, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Return metadata and tensors, which must fill a file of `size` bytes after its header.

    Raises:
      ValueError: the header is not JSON, repeats a key, or describes no such file.
    """
    header, origin = decode_json(text), 8 + len(text)
    if not isinstance(header, dict):
        raise ValueError(f"it must be a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        raise ValueError("__metadata__ must hold texts by name")
    entries = {name: _entry(name, fields, origin) for name, fields in header.items()}
    end = origin
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(
                f"{name!r} starts at byte {entry.start}, the tensor before it ends at {end}"
            )
        end = entry.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of a file of {size}")
    return metadata, entries


def _entry(name: str, fields: Any, origin: int) -> Entry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} is not a name in Unicode") from None
    if len(name) > _MAX_NAME:
        raise ValueError(f"{name[:40]!r}... is a name of {len(name)} characters")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has an unknown dtype")
    if not _sizes(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"{name!r} has no valid shape")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has no valid data_offsets")
    start, stop = offsets
    itemsize = DTYPES[dtype].itemsize
    # numpy checks the product of the nonzero axes even if another axis is empty.
    if math.prod(n for n in shape if n) * itemsize > _LARGEST:
        raise ValueError(f"{name!r} has a shape that is too large")
    if math.prod(shape) * itemsize != stop - start:
        raise ValueError(
            f"{name!r}: {dtype}{shape} takes {math.prod(shape) * itemsize} bytes, its data_offsets "
            f"are {offsets}"
        )
    return Entry(DTYPES[dtype], tuple(shape), origin + start, origin + stop)


def _sizes(values: Any) -> bool:
    """Return whether `values` is a list of integers from 0 to 2**63 - 1."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n <= _LARGEST for n in values)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _read_into(descriptor: int, start: int, buffer: np.ndarray, path: Path) -> None:
    view = memoryview(buffer.data)
    while len(view):
        count = _read_at(descriptor, start, view[:_AT_ONCE])
        if not count:
            raise ValueError(f"{path} ended while it was read")
        start, view = start + count, view[count:]


def _read_at(descriptor: int, start: int, view: memoryview) -> int:
    # At a position of its own: threads and forked processes share that of the descriptor.
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], start)
    os.lseek(descriptor, start, os.SEEK_SET)  # Windows
    data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)
