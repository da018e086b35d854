"""What a compiled program moves between devices, from its HLO text."""

import math
import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)|branch_computations=\{(.*?)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_BOUND = re.compile(r"ROOT .*compare\(.*, %?([\w.\-]+)\), direction=LT")
_CONSTANT = r"%?{}\b.* = s32\[\]\S* constant\((\d+)\)"
# The compiler for TPUs writes a collective into each fusion that runs while it goes on.
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
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
    seen: set[tuple[str, ...]] = set()

    def trips_of(line: str) -> int:
        known = _TRIPS.search(line)
        if known:
            return int(known[1])
        loop = _CONDITION.search(line)
        condition = lines.get(loop[1], []) if loop else []
        bound = next(filter(None, map(_BOUND.search, condition)), None)
        if bound is None:
            return 1
        constant = re.compile(_CONSTANT.format(re.escape(bound[1])))
        return int(next((m[1] for m in map(constant.search, condition) if m), 1))

    def visit(computation: str, times: int) -> None:
        for line in lines.get(computation, ()):
            match = _COLLECTIVE.search(line)
            if match:
                chain = _CHAIN.search(line)
                if chain and chain.groups() in seen:
                    continue
                if chain:
                    seen.add(chain.groups())
                for dtype, dims in _results(*match.groups()):
                    shape = tuple(int(n) for n in dims.split(",") if n)
                    found.append(Collective(match[2], dtype, shape, times))
                continue
            inner = times * trips_of(line)
            for one, several in _CALLED.findall(line):
                for called in filter(None, (one, *re.split(r"[,\s%]+", several))):
                    visit(called, inner)

    visit(entry, 1)
    return found


def _results(types: str, kind: str, start: str | None) -> list[tuple[str, str]]:
    """The dtypes and sizes of what a collective gives; its start has operands before them."""
    arrays: list[tuple[str, str]] = _ARRAY.findall(types)
    if start and kind in ("all-gather", "collective-permute"):
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    return arrays
