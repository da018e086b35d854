"""Builds program.cc for an architecture, and reads the file that comes out."""

import importlib.util
import pathlib
import shutil
import struct
import subprocess
import sys
from typing import NamedTuple

from q4jax.native import library

SOURCES = pathlib.Path(library.__file__).parent / "src"
PROGRAM = pathlib.Path(__file__).with_name("program.cc")
# As setup.py has them, and what leaves out all that an operating system or a library provides.
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-pic"),
    *("-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-fno-threadsafe-statics"),
    "-fno-asynchronous-unwind-tables",
]
BASES = {"avx512_bf16": ["avx512"]}  # whose kernels it uses, too
LINK = ["-nostdlib", "-static", "-Wl,--entry=linear", "-Wl,--build-id=none"]


class Segment(NamedTuple):
    """Bytes of a program, and where they belong; zeros follow up to `size`."""

    address: int
    data: bytes
    size: int


class Program(NamedTuple):
    """A program that is not loaded yet."""

    segments: list[Segment]
    symbols: dict[str, int]


def compiler(architecture):
    """The command that compiles for "x86_64" or "aarch64", or None."""
    if architecture == "aarch64":
        if importlib.util.find_spec("ziglang") is None:
            return None
        # "linux" for its headers' sake only.
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    found = shutil.which("g++")
    return found and [found, "-no-pie"]


def build(architecture, isa, folder):
    """The kernels `isa`, "neon" for one, as a program."""
    folder = pathlib.Path(folder, architecture)
    folder.mkdir(exist_ok=True)
    command = compiler(architecture)
    objects = [folder / f"{isa}-program.o"]
    more = ["-ffreestanding", f"-DKERNELS=k{isa.title().replace('_', '')}", f"-I{SOURCES}"]
    run(*command, *FLAGS, *more, "-c", PROGRAM, "-o", objects[0])
    for name in (isa, *BASES.get(isa, ())):
        objects.append(folder / f"{name}.o")
        if not objects[-1].exists():
            run(*command, *FLAGS, "-c", SOURCES / f"kernels_{name}.cc", "-o", objects[-1])
    run(*command, *LINK, *objects, "-o", folder / isa)
    return read((folder / isa).read_bytes())


def run(*command):
    """Raises with the command's complaints where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def read(file):
    """The segments and symbols of an ELF file of 64 bits."""
    assert file[:6] == b"\x7fELF\x02\x01"
    headers, sections = struct.unpack_from("<QQ", file, 32)
    header_count, _, section_count = struct.unpack_from("<HHH", file, 56)
    segments = []
    for i in range(header_count):
        kind, _, offset, address, _, stored, size = struct.unpack_from(
            "<IIQQQQQ", file, headers + 56 * i
        )
        if kind == 1:  # to be loaded
            segments.append(Segment(address, file[offset : offset + stored], size))
    symbols = {}
    table = [
        struct.unpack_from("<IIQQQQIIQQ", file, sections + 64 * i) for i in range(section_count)
    ]
    for _, kind, _, _, offset, size, names, *_ in table:
        if kind != 2:  # symbols
            continue
        for at in range(offset, offset + size, 24):
            name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", file, at)
            start = table[names][4] + name
            symbols[file[start : file.index(b"\0", start)].decode()] = value
    return Program(segments, symbols)
