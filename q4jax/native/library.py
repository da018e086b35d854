"""The shared library of the C++ kernels: find it, check that this JAX accepts it, register it."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from q4jax.core import codebooks

LIBRARY = pathlib.Path(__file__).with_name("libq4jax.so")
VARIABLE = "Q4JAX_NATIVE"
TARGETS = (
    "q4jax_linear",
    "q4jax_transposed",
    "q4jax_quantize",
    "q4jax_quantize_scales",
    "q4jax_dequantize",
)
_LOCK = threading.Lock()


class Status(NamedTuple):
    """Whether the CPU kernels are in use.

    Attributes:
      isa: the instruction set that the kernels use, "avx512_bf16", "avx512", "avx2", "neon" or
        "portable"; None where they are not in use.
      reason: why it is in use, or why none is.
      available: the instruction sets of this machine that they were built for, best first.
    """

    isa: str | None
    reason: str
    available: tuple[str, ...]


class _Unusable(Exception):
    """The library cannot be used, for the reason in the message."""


def status() -> Status:
    """Return whether the CPU kernels are in use, with which instruction set, and why.

    Examples:
      >>> import q4jax.native
      >>> q4jax.native.status().reason != ""
      True
    """
    with _LOCK:
        return _load()[1]


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Run all kernels with an instruction set of `status().available`, in every thread.

    Raises:
      ValueError: it is not one of them.
    """
    before = status()
    library = _load()[0]
    if before.isa is None or library is None or not library.q4jax_select(isa.encode()):
        raise ValueError(f"isa must be one of {before.available}, got {isa!r}")
    try:
        yield
    finally:
        library.q4jax_select(before.isa.encode())


def _names(library: ctypes.CDLL | None) -> tuple[str, ...]:
    """Return the instruction sets that a library has for this machine, best first."""
    names: list[str] = []
    while library is not None and (name := library.q4jax_isa(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    setting = os.environ.get(VARIABLE, "1")
    if setting == "0":
        return None, Status(None, f"{VARIABLE}=0 turns it off", ())
    try:
        library = _open()
    except _Unusable as error:
        return None, Status(None, str(error), ())
    available = _names(library)
    isa = available[0] if setting == "1" else setting
    if not library.q4jax_select(isa.encode()):
        allowed = ", ".join(("0", "1", *available))
        return None, Status(None, f"{VARIABLE} must be one of {allowed}; got {setting}", available)
    for target in TARGETS:
        capsule = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    why = "the best of this machine" if setting == "1" else f"{VARIABLE}={setting}"
    return library, Status(isa, why, available)


def _open() -> ctypes.CDLL:
    """Load the library, declare its functions and set its tables."""
    if not LIBRARY.exists():
        raise _Unusable(f"it was not built: there is no {LIBRARY.name} in {LIBRARY.parent}")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise _Unusable(f"it cannot be loaded: {error}") from error
    library.q4jax_set_scale_table.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.q4jax_set_scale_table.restype = ctypes.c_bool
    library.q4jax_add_code_table.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.q4jax_add_code_table.restype = ctypes.c_int64
    library.q4jax_select.argtypes = [ctypes.c_char_p]
    library.q4jax_select.restype = ctypes.c_bool
    library.q4jax_isa.restype = ctypes.c_char_p
    check_version((library.q4jax_api_major(), library.q4jax_api_minor()), accepted_version())
    data = scale_table()
    if not library.q4jax_set_scale_table(data, len(data)):
        raise _Unusable("it was built from other sources than this Python code")
    _add_code_tables(library)
    return library


def accepted_version() -> tuple[int, int] | None:
    """Read (major, minor) of XLA's interface from jaxlib's headers; None if it is unknown."""
    try:
        text = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    except OSError:
        return None
    found = [re.search(rf"define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(match[1]) if match else -1 for match in found)
    return (major, minor) if min(major, minor) >= 0 else None


def check_version(built: tuple[int, int], accepted: tuple[int, int] | None) -> None:
    """Raise where JAX would refuse the library, which would disable its CPU backend."""
    if accepted is None:
        raise _Unusable(f"jaxlib {_jaxlib()} does not say which interface it accepts")
    if built[0] != accepted[0] or built[1] > accepted[1]:
        raise _Unusable(
            f"it was built for XLA's interface {built[0]}.{built[1]}, and jaxlib "
            f"{_jaxlib()} accepts {accepted[0]}.{accepted[1]}"
        )


def _jaxlib() -> str:
    return importlib.metadata.version("jaxlib")


def quant_type_number(quant_type: str) -> int:
    """Return the number by which the library knows a quant type, and add its table if it is new.

    Raises:
      NotImplementedError: the library has no room for another quant type.
    """
    with _LOCK:
        library = _load()[0]
        assert library is not None  # the caller asked `status`
        _add_code_tables(library)
    if _numbers[quant_type] < 0:
        raise NotImplementedError(f"implementation='native' has no room for {quant_type!r}")
    return _numbers[quant_type]


_numbers: dict[str, int] = {}


def _add_code_tables(library: ctypes.CDLL) -> None:
    # In the order of CODEBOOKS, since the numbers are in compiled programs.
    for name, book in codebooks.CODEBOOKS.items():
        if name not in _numbers:
            data = code_table(book)
            _numbers[name] = library.q4jax_add_code_table(data, len(data))


def code_table(book: codebooks.Codebook) -> bytes:
    """The tables of a quant type, as `CodeTable` in src/kernel_args.h has them."""
    return _bytes(book.values, book.thresholds, book.sorted_codes)


def scale_table() -> bytes:
    """The tables of the scales' 8-bit format, as `ScaleTable` in src/kernel_args.h has them."""
    return _bytes(codebooks.DYNAMIC_MAP, codebooks.DYNAMIC_THRESHOLDS)


def _bytes(*arrays: np.ndarray) -> bytes:
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
