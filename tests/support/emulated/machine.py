"""Emulated processors that run a `program.Program`."""

import abc
import ctypes
import importlib.util
import mmap
import multiprocessing
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile

import numpy as np

PAGE = 4096
STACK = 0x7000_0000  # its end
STACK_SIZE = 1 << 20
RETURN = 0x7100_0000  # where a call returns to; holds no code


def pages(address, size):
    """The first page that holds any of it, and the size of all that do."""
    first = address // PAGE * PAGE
    return first, -(-(address + size - first) // PAGE) * PAGE


class Machine(abc.ABC):
    """One processor with its memory. What it does outside of mapped pages raises `Fault`."""

    architecture: str
    package: str  # that it needs

    @classmethod
    def missing(cls):
        """Why it cannot run here, or None."""
        if importlib.util.find_spec(cls.package) is None:
            return f"{cls.package} is not installed"
        return None

    def load(self, program):
        """Maps the program's segments and a stack."""
        end = 0
        for segment in sorted(program.segments):
            first, size = pages(segment.address, segment.size)
            skipped = max(end - first, 0)  # segments may share a page
            if size > skipped:
                self.map(first + skipped, size - skipped)
            end = first + size
            self.write(segment.address, segment.data)
        self.map(STACK - STACK_SIZE, STACK_SIZE)
        self.map(RETURN, PAGE)

    @abc.abstractmethod
    def map(self, address, size):
        """Makes whole pages accessible; they hold zeros."""

    @abc.abstractmethod
    def unmap(self, address, size):
        """Undoes `map`."""

    @abc.abstractmethod
    def write(self, address, data):
        """Stores bytes."""

    @abc.abstractmethod
    def read(self, address, size):
        """Bytes from memory."""

    @abc.abstractmethod
    def call(self, function, *integers):
        """Calls the function at an address as C would, and returns when it does.

        Raises:
          Fault: it did what it may not.
        """


class Fault(Exception):
    """An access to memory that is not mapped, a trap, or an instruction that is unknown."""


class Arm(Machine):
    """aarch64 on Unicorn."""

    architecture = "aarch64"
    package = "unicorn"

    def __init__(self):
        import unicorn
        from unicorn import arm64_const

        self._unicorn, self._registers = unicorn, arm64_const
        self._cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._cpu.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # NEON is allowed

    def map(self, address, size):
        self._cpu.mem_map(address, size)

    def unmap(self, address, size):
        self._cpu.mem_unmap(address, size)

    def write(self, address, data):
        self._cpu.mem_write(address, bytes(data))

    def read(self, address, size):
        return bytes(self._cpu.mem_read(address, size))

    def call(self, function, *integers):
        names = self._registers
        for i, value in enumerate(integers):
            self._cpu.reg_write(names.UC_ARM64_REG_X0 + i, value)
        self._cpu.reg_write(names.UC_ARM64_REG_SP, STACK)
        self._cpu.reg_write(names.UC_ARM64_REG_LR, RETURN)
        try:
            self._cpu.emu_start(function, RETURN)
        except self._unicorn.UcError as error:
            at = self._cpu.reg_read(names.UC_ARM64_REG_PC)
            raise Fault(f"{error}, at {at:#x}") from error


# Two new names of old functions, for a C library older than the one that bochscpu was built with.
NEW_NAMES = """
#include <stdarg.h>
int vsscanf(const char*, const char*, va_list);
unsigned long long strtoull(const char*, char**, int);
int __isoc23_sscanf(const char* text, const char* format, ...) {
  va_list list;
  va_start(list, format);
  int found = vsscanf(text, format, list);
  va_end(list);
  return found;
}
unsigned long long __isoc23_strtoull(const char* text, char** end, int base) {
  return strtoull(text, end, base);
}
"""


def bochscpu():
    """The package."""
    try:
        import bochscpu.cpu
        import bochscpu.memory
    except ImportError as error:
        compiler = shutil.which("gcc")
        if "__isoc23" not in str(error) or compiler is None:
            raise
        with tempfile.TemporaryDirectory() as folder:
            library = str(pathlib.Path(folder, "names.so"))
            command = [compiler, "-shared", "-fPIC", "-xc", "-", "-o", library]
            subprocess.run(command, input=NEW_NAMES, text=True, check=True, timeout=60)
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        import bochscpu.cpu
        import bochscpu.memory
    return bochscpu


def choose(model):
    """The package, whose next session has a processor of that number in Bochs."""
    package = bochscpu()
    library = ctypes.CDLL(package._bochscpu.__file__)
    parameter = library.sim_get_param_enum
    parameter.argtypes, parameter.restype = [ctypes.c_char_p], ctypes.c_void_p
    change = library._ZN15bx_param_enum_c3setEl  # bx_param_enum_c::set(long)
    change.argtypes, change.restype = [ctypes.c_void_p, ctypes.c_long], None
    change(parameter(b"cpu.model"), model)
    return package


class X86(Machine):
    """x86-64: `Bochs` in a process of its own, which cannot have two."""

    architecture = "x86_64"
    package = "bochscpu"
    model: int  # the processor's number among those of Bochs

    def __init__(self):
        processes = multiprocessing.get_context("spawn")
        self._connection, other = processes.Pipe()
        processes.Process(target=serve, args=(other, self.model), daemon=True).start()
        other.close()

    def _ask(self, *request):
        self._connection.send(request)
        answer = self._connection.recv()
        if isinstance(answer, Fault):
            raise answer
        return answer

    def map(self, address, size):
        self._ask("map", address, size)

    def unmap(self, address, size):
        self._ask("unmap", address, size)

    def write(self, address, data):
        self._ask("write", address, bytes(data))

    def read(self, address, size):
        return self._ask("read", address, size)

    def call(self, function, *integers):
        self._ask("call", function, *integers)


class SkylakeX(X86):
    """With the AVX-512 of the first processors that had it."""

    model = 26


class SapphireRapids(X86):
    """With BF16 among what was added since."""

    model = 30


def serve(connection, model):
    """Does what an `X86` asks for, until that is gone."""
    machine = Bochs(model)
    while True:
        try:
            method, *arguments = connection.recv()
        except EOFError:
            os._exit(0)  # else the package lists objects that it takes for leaked
        try:
            connection.send(getattr(machine, method)(*arguments))
        except Fault as fault:
            connection.send(fault)


class Bochs(Machine):
    """Long mode in ring 0, with page tables that map addresses to themselves."""

    PAGES = (2 << 30) // PAGE  # that addresses of a program may lie in
    TABLES = PAGES * PAGE  # where their page tables are
    ENTRIES = TABLES + 4 * PAGE  # the last level of these, in one piece
    PRESENT = 3  # and writable

    def __init__(self, model):
        self._bochs = bochscpu = choose(model)
        self._session = bochscpu.Session()
        self._session.missing_page_handler = self._missing
        self._memory = mmap.mmap(-1, self.ENTRIES + 8 * self.PAGES, flags=mmap.MAP_PRIVATE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._back(self.TABLES, len(self._memory) - self.TABLES)
        self._entries = np.frombuffer(self._memory, np.uint64, self.PAGES, self.ENTRIES)
        root, middle = self.TABLES, self.TABLES + PAGE
        directories = middle + PAGE
        self._link(root, middle, 1)
        self._link(middle, directories, 2)
        self._link(directories, self.ENTRIES, 2 * 512)
        self._hook = bochscpu.Hook()
        self._hook.exception = self._exception
        self._hook.hlt = lambda session, _: session.stop()
        self._fault = None

    def _back(self, address, size):
        """Gives physical pages their place in `_memory`."""
        for page in range(address, address + size, PAGE):
            self._bochs.memory.page_insert(page, self._start + page)

    def _link(self, table, target, count):
        """Fills a page table with the addresses of the tables from `target` on."""
        entries = [target + PAGE * i | self.PRESENT for i in range(count)]
        self.write(table, struct.pack(f"<{count}Q", *entries))

    def map(self, address, size):
        self._back(address, size)
        self.write(address, bytes(size))
        first, end = address // PAGE, (address + size) // PAGE
        self._entries[first:end] = np.arange(first, end) * PAGE | self.PRESENT

    def unmap(self, address, size):
        self._entries[address // PAGE : (address + size) // PAGE] = 0

    def write(self, address, data):
        self._memory[address : address + len(data)] = bytes(data)

    def read(self, address, size):
        return self._memory[address : address + size]

    def call(self, function, *integers):
        self.write(RETURN, b"\xf4")  # hlt
        self.write(STACK - 8, struct.pack("<Q", RETURN))
        state = self._bochs.State()
        self._bochs.cpu.set_long_mode(state)
        state.cr3 = self.TABLES
        state.cr4 |= 1 << 9 | 1 << 10 | 1 << 18  # OSFXSR, OSXMMEXCPT, OSXSAVE
        state.xcr0 = 0xE7  # all registers up to ZMM
        state.mxcsr, state.mxcsr_mask = 0x1F80, 0xFFFF
        state.cs = self._segment(0x08, 0x209B)
        state.ds = state.es = state.ss = self._segment(0x10, 0xC093)
        state.rip, state.rsp = function, STACK - 8
        for name, value in zip(("rdi", "rsi", "rdx", "rcx"), integers, strict=False):
            setattr(state, name, value)
        self._session.cpu.state = state
        self._fault = None
        self._session.run([self._hook])
        if self._fault is not None:
            raise Fault(f"{self._fault}, at {self._session.cpu.state.rip:#x}")

    def _segment(self, selector, attributes):
        segment = self._bochs.Segment()
        segment.present, segment.selector, segment.attr = True, selector, attributes
        segment.base, segment.limit = 0, 0xFFFFFFFF
        return segment

    def _exception(self, session, _, vector, code):
        self._fault = f"exception {vector} ({code})"
        session.stop()

    def _missing(self, address):
        raise Fault(f"no memory at {address:#x}")
