"""What jax-triton puts into a program: each kernel's PTX, and how it is launched.

A call is a protocol buffer: https://protobuf.dev/programming-guides/encoding says how it is read,
and jaxlib's `triton.proto` has the numbers of the fields.
"""

import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.mesh import AbstractDevice  # no public name: which GPU a program is lowered for

from tests.support.gpu.targets import GPUS
from tests.support.ptx.machine import Launch

_VARINT, _BYTES = 0, 2  # wire types
_CALL, _KERNEL = 1, 1
_NAME, _WARPS, _SHARED_BYTES, _PTX = 1, 2, 3, 4
_GRID, _PARAMETER = (2, 3, 4), 5
_ARRAY, _INT32 = 1, 3
_ALIGNMENT = 2


@dataclasses.dataclass(frozen=True)
class Call:
    """A kernel's PTX and its launch."""

    ptx: str
    launch: Launch


def calls(gpu: str, function: Any, *args: Any) -> list[Call]:
    """The Triton calls of a function.

    Args:
      gpu: a key of `GPUS`.
      function: the function.
      *args: shapes and dtypes, or pytrees of them.
    """
    device = AbstractDevice(device_kind=GPUS[gpu][0], num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return [_read(message) for message in _messages(lowered.compiler_ir().operation)]


def _messages(operation: Any) -> Iterator[bytes]:
    if operation.name == "stablehlo.custom_call" and "mhlo.backend_config" in operation.attributes:
        opaque = operation.attributes["mhlo.backend_config"]["opaque"]
        yield zlib.decompress(opaque.value_bytes)
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield from _messages(inner.operation)


def _read(message: bytes) -> Call:
    call = _fields(_only(_fields(message), _CALL))
    kernel = _fields(_only(call, _KERNEL))
    parameters = [_fields(value) for value in call.get(_PARAMETER, [])]
    arrays = [_fields(_only(p, _ARRAY)) for p in parameters if _ARRAY in p]
    ptx = _only(kernel, _PTX).decode()
    scalars = {i: _only(p, _INT32) for i, p in enumerate(parameters) if _ARRAY not in p}
    # Triton adds two addresses of scratch memory, of which its kernels here want none.
    scalars |= {len(parameters): 0, len(parameters) + 1: 0}
    launch = Launch(
        grid=tuple(_only(call, number) for number in _GRID),
        threads=32 * _only(kernel, _WARPS),
        shared_bytes=_only(kernel, _SHARED_BYTES, 0),
        scalars=scalars,
        alignment=min(_only(array, _ALIGNMENT) for array in arrays),
    )
    return Call(ptx, launch)


def _only(fields: dict[int, list[Any]], number: int, *default: Any) -> Any:
    [value] = fields.get(number, default)
    return value


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a message by their numbers: integers, or the bytes of texts and messages."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        key, at = _integer(message, at)
        value, at = _integer(message, at)
        if key & 7 == _BYTES:
            value, at = message[at : at + value], at + value
        elif key & 7 != _VARINT:
            raise ValueError(f"a field of wire type {key & 7}")
        found.setdefault(key >> 3, []).append(value)
    return found


def _integer(message: bytes, at: int) -> tuple[int, int]:
    """The integer that begins at a place, seven bits a byte, and the place behind it."""
    value, shift = 0, 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
