"""What a compiled program holds for the GPU: its kernels' registers, memory and instructions.

A serialized executable contains its cubins (ELF files for the GPU) in chunks compressed with
snappy. They are found by their header and read with the `cuobjdump` that Triton's wheel ships.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from jax.experimental import serialize_executable

_CUDA_MACHINE = 190


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's resources and instructions.

    Attributes:
      registers: a thread.
      stack, local: bytes a thread; not 0 where registers spill.
      opcodes: how often each instruction appears, with its suffixes.
      loop: the same for the body of its longest loop.
    """

    registers: int
    stack: int
    local: int
    opcodes: dict[str, int]
    loop: dict[str, int]

    def count(self, prefix: str, where: str = "opcodes") -> int:
        """How often instructions that start so appear."""
        return sum(n for name, n in getattr(self, where).items() if name.startswith(prefix))


def kernels(compiled: Any) -> dict[str, Kernel]:
    """The kernels of a compiled jax program, by name."""
    found: dict[str, Kernel] = {}
    for cubin in _cubins(compiled):
        found |= of_file(cubin)
    return found


def _cubins(compiled: Any) -> list[bytes]:
    """The cubins of a compiled program.

    Where a chunk starts is guessed. A wrong guess may yield a damaged file, which the disassembler
    refuses.
    """
    data = serialize_executable.serialize(compiled)[0]
    for found in sorted(_candidates(data, 2), key=len, reverse=True):
        with contextlib.suppress(subprocess.CalledProcessError):
            for cubin in found:
                _read(cubin, "-sass")
            return found
    raise ValueError("the serialized program holds no cubin that can be read")


def _candidates(data: bytes, depth: int) -> Iterator[list[bytes]]:
    """The ELF files in `data`, and in each chunk that some part of its head decompresses to."""
    if found := list(_elf_files(data)):
        yield found
    for start in range(min(len(data), 4096) if depth else 0):
        inner = _snappy(data, start)
        if inner is not None and b"\x7fELF" in inner:
            yield from _candidates(inner, depth - 1)


def _elf_files(data: bytes) -> Iterator[bytes]:
    start = -1
    while (start := data.find(b"\x7fELF", start + 1)) >= 0:
        header = data[start : start + 64]
        if len(header) < 64 or struct.unpack_from("<H", header, 18)[0] != _CUDA_MACHINE:
            continue
        programs, sections = struct.unpack_from("<QQ", header, 32)
        sizes = struct.unpack_from("<4H", header, 54)
        end = max(sections + sizes[2] * sizes[3], programs + sizes[0] * sizes[1])
        if 64 < end <= len(data) - start:
            yield data[start : start + end]


def _snappy(data: bytes, i: int) -> bytes | None:
    """The snappy stream that starts at `i`, decompressed; None if there is none of some size."""
    try:
        length, shift = 0, 0
        while True:
            byte = data[i]
            i += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if not 1024 < length < 1 << 27:
            return None
        out = bytearray()
        while len(out) < length:
            tag = data[i]
            i += 1
            kind, size = tag & 3, tag >> 2
            if kind == 0:
                if size >= 60:
                    width = size - 59
                    size = int.from_bytes(data[i : i + width], "little")
                    i += width
                out += data[i : i + size + 1]
                i += size + 1
                continue
            if kind == 1:
                size, distance = (size & 7) + 4, (tag >> 5 << 8) | data[i]
                i += 1
            else:
                width = 2 if kind == 2 else 4
                distance = int.from_bytes(data[i : i + width], "little")
                i += width
                size += 1
            if not 0 < distance <= len(out):
                return None
            for _ in range(size):
                out.append(out[-distance])
    except IndexError:
        return None
    return bytes(out) if len(out) == length else None


def loops(compiled: Any) -> dict[str, list[str]]:
    """Each kernel's longest loop as the disassembler prints it: address and instruction."""
    return {
        part.split(None, 1)[0]: [f"{at:04x}  {text}" for at, _, text in _longest_loop(_lines(part))]
        for cubin in _cubins(compiled)
        for part in _functions(_read(cubin, "-sass"))
    }


def of_file(cubin: bytes) -> dict[str, Kernel]:
    """The kernels of a cubin, by name."""
    resources = {
        m[1]: {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", m[2])}
        for m in re.finditer(r"Function (\w+):\n\s*(.*)", _read(cubin, "-res-usage"))
    }
    found = {}
    for part in _functions(_read(cubin, "-sass")):
        name = part.split(None, 1)[0]
        used, lines = resources[name], _lines(part)
        everything, loop = (
            dict(collections.Counter(opcode for _, opcode, _ in chosen))
            for chosen in (lines, _longest_loop(lines))
        )
        found[name] = Kernel(used["REG"], used["STACK"], used["LOCAL"], everything, loop)
    return found


def _functions(sass: str) -> list[str]:
    return re.split(r"\n\s*Function : ", sass)[1:]


def _lines(sass: str) -> list[tuple[int, str, str]]:
    """The instructions of a function: address, opcode, the whole of it."""
    pattern = r"/\*([0-9a-f]{4,6})\*/\s+((?:@!?U?P\w+ )?([A-Z][\w.]*)[^;]*);"
    return [(int(at, 16), name, text.strip()) for at, text, name in re.findall(pattern, sass)]


def _longest_loop(lines: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The longest stretch between a branch and its target.

    What is behind the end of a thread is rare, such as the way back from a wait that took longer.
    """
    first, last = 0, -1
    for at, name, text in lines:
        if text == "EXIT":
            break
        target = re.search(r"0x([0-9a-f]+)", text) if name.startswith("BRA") else None
        if target and at - int(target[1], 16) > last - first and int(target[1], 16) < at:
            first, last = int(target[1], 16), at
    return [line for line in lines if first <= line[0] <= last]


@functools.cache
def _read(cubin: bytes, option: str) -> str:
    """What `cuobjdump` says of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _cuobjdump(option, file.name)


def _cuobjdump(option: str, path: str) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = pathlib.Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin")
    command = [folder / "cuobjdump", option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
