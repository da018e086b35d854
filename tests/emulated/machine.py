"""Emulated processors that run a `program.Program`."""

import abc
import importlib.util

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
