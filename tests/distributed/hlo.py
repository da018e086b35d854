"""The collectives of a compiled program."""

import math
import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_LINE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Collective(NamedTuple):
    """One array that a collective operation gives to each device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.size * _BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether its elements are floats."""
        return self.dtype in ("f32", "bf16", "f16")


def collectives(text: str) -> list[Collective]:
    """Those of a program, from its HLO; one in the body of a loop counts once."""
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match:
            for dtype, dims in _ARRAY.findall(match[1]):
                shape = tuple(int(n) for n in dims.split(",") if n)
                found.append(Collective(match[2], dtype, shape))
    return found
