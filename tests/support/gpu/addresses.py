"""The addresses that one program of a kernel reads and writes, from its PTX, without its arrays.

All threads of a program run at once on numpy arrays. Only integers, predicates and branches are
computed; what is loaded from an array is 0 unless it is told, and all else (floats, shared memory,
tensor cores) is unknown. An unknown address or mask is an error; an unknown branch is not taken.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

_ARRAY_BITS = 44  # parameter number p is an array at (p + 1) << 44
_WIDTHS = {"pred": 1, **{f"{kind}{n}": n for kind in "bsu" for n in (8, 16, 32, 64)}}
_BINARY: dict[str, Callable[..., Any]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "add": operator.add,
    "sub": operator.sub,
    "min": np.minimum,
    "max": np.maximum,
    "mul": operator.mul,
    "div": operator.floordiv,
    "rem": operator.mod,
    "shl": operator.lshift,
    "shr": operator.rshift,
}
_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}

Value = Any
"""An int64 for each thread, of which an instruction reads the bits of its type; None: unknown."""


@dataclasses.dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory.

    Attributes:
      array: which parameter of the kernel.
      write: whether it is a store.
      offsets: bytes from the array's start, one for each thread that takes part.
      threads: the numbers of these.
      size: bytes a thread.
      cached: whether it goes through the L1 cache.
    """

    array: int
    write: bool
    offsets: np.ndarray
    threads: np.ndarray
    size: int
    cached: bool

    def sectors(self) -> set[tuple[int, int]]:
        """The 32-byte sectors that warps ask for: (warp, sector)."""
        warps = self.threads // 32
        ends = (self.offsets // 32, (self.offsets + self.size - 1) // 32)
        return {pair for end in ends for pair in zip(warps.tolist(), end.tolist(), strict=True)}


class Program:
    """One program (a block of threads) of a kernel.

    Args:
      ptx: the text of a module.
      kernel: the kernel's name.
      number: the program's number on each axis of the grid.
      loaded: what a load from a parameter gives, for some of them; from others it gives 0.
    """

    def __init__(
        self,
        ptx: str,
        kernel: str,
        number: tuple[int, int, int],
        loaded: Mapping[int, int] = MappingProxyType({}),
    ):
        head, body = ptx.split(f".entry {kernel}(", 1)[1].split("{", 1)
        self.parameters = re.findall(rf"{kernel}_param_\d+", head)
        [threads] = re.findall(r"\.(?:req|max)ntid (\d+)", head)
        self.threads = np.arange(int(threads))
        self.values: dict[str, Value] = {"%tid.x": self.threads}
        self.values |= {f"%ctaid.{a}": self._all(n) for a, n in zip("xyz", number, strict=True)}
        self.accesses: list[Access] = []
        self.loaded = loaded
        self.code, self.labels = _parse(body.split("\n}\n", 1)[0])

    def run(self) -> list[Access]:
        """Return the accesses in their order."""
        at = 0
        while at < len(self.code):
            guard, (operation, *modifiers), operands = self.code[at]
            mask = self._mask(guard)
            at += 1
            if operation == "bra":
                if mask is not None and mask.any():
                    assert mask.all(), f"threads part at {operands}"
                    at = self.labels[operands[0]]
            elif operation == "ret":
                break
            elif operation in ("ld", "st", "cp") and "global" in modifiers:
                self._access(operation, modifiers, operands, mask)
            elif operands and operation not in ("st", "cp", "bar"):
                self._assign(operands[0], self._compute(operation, modifiers, operands[1:]), guard)
        return self.accesses

    def _all(self, number: int) -> np.ndarray:
        return np.full(len(self.threads), number, np.int64)

    def _mask(self, guard: str) -> Value:
        """Which threads a guard lets through; None if unknown."""
        if not guard:
            return self.threads >= 0
        value = self.values[guard.lstrip("!")]
        return None if value is None else (value & 1) != (guard[0] == "!")

    def _value(self, text: str) -> Value:
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text):
            return self._all(int(text, 0))
        return self.values.get(text)

    def _assign(self, target: str, found: Value, guard: str) -> None:
        registers = _registers(target)
        mask = self._mask(guard)
        for register in registers:
            value = found if len(registers) == 1 else None
            if guard:
                old = self.values.get(register)
                unknown = any(v is None for v in (old, value, mask))
                value = None if unknown else np.where(mask, value, old)
            self.values[register] = value

    def _access(
        self, operation: str, modifiers: list[str], operands: list[str], mask: Value
    ) -> None:
        base, _, more = operands[operation != "st"].strip("[] ").partition("+")
        address = self._value(base.strip())
        assert address is not None and mask is not None, (operation, operands)
        address = address + int(more or "0", 0)
        if operation == "cp":
            size = int(operands[2], 0)
            if len(operands) > 3:  # the bytes to read, or a predicate: read none
                last = self._value(operands[3])
                mask = mask & ((last & 1 == 0) if operands[3].startswith("%p") else (last != 0))
        else:
            [vector] = re.findall(r"\bv(\d)", ".".join(modifiers)) or ["1"]
            size = int(vector) * int(modifiers[-1][1:]) // 8
        numbers = (address + (1 << _ARRAY_BITS - 1)) >> _ARRAY_BITS
        for number in sorted(set(numbers[mask].tolist())):
            here = mask & (numbers == number)
            offsets = address[here] - (number << _ARRAY_BITS)
            self.accesses.append(
                Access(
                    array=number - 1,
                    write=operation == "st",
                    offsets=offsets,
                    threads=self.threads[here],
                    size=size,
                    cached="cg" not in modifiers,
                )
            )
        if operation == "ld":
            read = {self.loaded.get(n - 1, 0) for n in set(numbers[mask].tolist())} or {0}
            [value] = read
            self.values |= {register: self._all(value) for register in _registers(operands[0])}

    def _compute(self, operation: str, modifiers: list[str], operands: list[str]) -> Value:
        """The result of an instruction on integers; None of any other."""
        if operation == "ld" and modifiers[0].startswith("param"):
            number = self.parameters.index(operands[0].strip("[]"))
            return self._all((number + 1) << _ARRAY_BITS)
        if operation == "cvta":
            return self._value(operands[0])
        kind = modifiers[-1] if modifiers else ""
        if kind not in _WIDTHS:
            return None
        values = [self._value(text) for text in operands]
        if any(value is None for value in values):
            return None
        values = [_read(value, kind) for value in values]
        if operation in ("shl", "shr"):
            values[1] = np.minimum(values[1], 63)
        return _integer(operation, modifiers, *values)


def _integer(operation: str, modifiers: list[str], *values: Value) -> Value:
    a, b, c = (*values, 0, 0)[:3]
    if operation in ("mov", "cvt"):
        return a
    if operation == "mul" and "hi" in modifiers:
        assert modifiers[-1] == "u32", modifiers
        return ((a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
    if operation in _BINARY:
        return _BINARY[operation](a, b)
    if operation == "mad" and "lo" in modifiers:
        return a * b + c
    if operation == "not":
        return ~a
    if operation == "neg":
        return -a
    if operation == "selp":
        return np.where(c & 1, a, b)
    if operation == "setp":
        found = _COMPARE[modifiers[0]](a, b).astype(np.int64)
        return found if len(modifiers) == 2 else _BINARY[modifiers[1]](found, c & 1)
    return None


def _read(value: np.ndarray, kind: str) -> np.ndarray:
    """The number that an instruction of this type sees."""
    width = _WIDTHS[kind]
    if width == 64:
        return value
    low = value & ((1 << width) - 1)
    return low - ((low >> (width - 1)) << width) if kind.startswith("s") else low


def _registers(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


def _parse(body: str) -> tuple[list[tuple[str, list[str], list[str]]], dict[str, int]]:
    """(guard, operation with its modifiers, operands) of each instruction, and the labels."""
    code: list[tuple[str, list[str], list[str]]] = []
    labels: dict[str, int] = {}
    for line in re.sub(r"//.*", "", body).splitlines():
        if label := re.fullmatch(r"\s*(\$?\w+):\s*", line):
            labels[label[1]] = len(code)
            continue
        for statement in re.sub(r"^\s*\{\s*(?=\.reg)|\}\s*$", "", line).split(";"):
            match = re.match(r"\s*(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
            if match:
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", match[3])
                code.append((match[1] or "", match[2].split("."), operands))
    return code, labels
