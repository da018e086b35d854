"""What a compiled program moves between devices, from its HLO text."""

import math
import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)|branch_computations=\{(.*?)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "u8": 1, "s8": 1, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Collective(NamedTuple):
    """An array that a collective operation gives to each device.

    Attributes:
      kind: such as "all-gather".
      dtype: as HLO names it.
      shape: of the result.
      times: how often it is run; in a loop whose length is not known, once.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int

    @property
    def size(self) -> int:
        """Elements of the result."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the results of all runs."""
        return self.size * _BYTES[self.dtype] * self.times

    @property
    def is_float(self) -> bool:
        """Whether its elements are floats."""
        return self.dtype in ("f32", "bf16", "f16")


def collectives(text: str) -> list[Collective]:
    """Those of a program, by `compiled.as_text()`."""
    lines: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name = match[1]
            lines[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            lines[name].append(line)

    found: list[Collective] = []

    def visit(computation: str, times: int) -> None:
        for line in lines.get(computation, ()):
            match = _COLLECTIVE.search(line)
            if match:
                for dtype, dims in _ARRAY.findall(match[1]):
                    shape = tuple(int(n) for n in dims.split(",") if n)
                    found.append(Collective(match[2], dtype, shape, times))
                continue
            trips = _TRIPS.search(line)
            inner = times * int(trips[1]) if trips else times
            for one, several in _CALLED.findall(line):
                for called in filter(None, (one, *re.split(r"[,\s%]+", several))):
                    visit(called, inner)

    visit(entry, 1)
    return found
