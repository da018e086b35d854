"""Which rows are measured, in what order of importance, and what is asked of each.

The floors and aims are for an H200. On another GPU they are printed all the same: the ratios
compare with what that GPU's own memory and cuBLAS do.
"""

import dataclasses
import itertools

SHAPES = (
    (4096, 4096),
    (28672, 8192),
    (14336, 4096),
    (4096, 14336),
    (8192, 28672),
    (11008, 4096),
    (4096, 11008),
)
"""[N, K] of layers, the most telling first."""

MS = (1, 16, 64, 512, 4096, 32, 8, 2048, 128, 4, 256, 1024, 2)
"""Rows of the activation, likewise."""

LARGE_WEIGHT = 64_000_000
"""Bytes of codes from which reading a weight takes long beside starting a kernel."""

BANDWIDTH = "share of copy bandwidth"
DENSE = "x dense"
BITSANDBYTES = "x bitsandbytes"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      operation: "linear", "linear_transpose", "dequantize" or "quantize".
      n, k: of the weight.
      m: rows of the activation; 0 where there is none.
    """

    operation: str
    n: int
    k: int
    m: int = 0

    def __str__(self):
        m = f" M={self.m}" if self.m else ""
        return f"{self.operation} [{self.n}, {self.k}]{m}"


def rows(shapes=SHAPES, ms=MS):
    """All of them, the most important first."""
    ranked = []
    for (i, (n, k)), (j, m) in itertools.product(enumerate(shapes), enumerate(ms)):
        ranked.append((2 * i + j, Row("linear", n, k, m)))
        ranked.append((2 * i + j + 4, Row("linear_transpose", n, k, m)))
    for i, (n, k) in enumerate(shapes):
        ranked += [
            (2 * i + j, Row(name, n, k)) for j, name in enumerate(("dequantize", "quantize"))
        ]
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a number must reach, and what it should.

    Attributes:
      regime: where this is asked.
      metric: which number.
      floor: that every cell must reach.
      aim: that their geometric mean should reach; None where there is none.
    """

    regime: str
    metric: str
    floor: float
    aim: float | None

    def verdict(self, value):
        """ "aim", "floor" or "missed"."""
        if value < self.floor:
            return "missed"
        return "aim" if self.aim is not None and value >= self.aim else "floor"


_DENSE_GOALS = (
    ("M = 1", (1, 1), 2.2, 2.7),
    ("M = 2 to 16", (2, 16), 2.0, 3.0),
    ("M = 32", (32, 32), 1.3, 2.0),
    ("M = 64", (64, 64), 1.0, 1.5),
    ("M = 512", (512, 512), 0.70, 0.85),
    ("M = 2048", (2048, 2048), 0.90, 0.95),
    ("M = 4096 and more", (4096, 2**31), 0.95, 0.98),
)


def goals(row, packed_bytes):
    """What is asked of a row; between the M that are named, nothing is."""
    if row.operation == "dequantize":
        return [Goal("dequantize", BANDWIDTH, 0.80, 0.90)]
    if row.operation == "quantize":
        return []
    asked = [
        Goal(f"{row.operation}, {name}", DENSE, floor, aim)
        for name, (low, high), floor, aim in _DENSE_GOALS
        if low <= row.m <= high
    ]
    if row.m == 1 and packed_bytes >= LARGE_WEIGHT:
        asked.append(Goal(f"{row.operation}, M = 1, 64 MB and more", BANDWIDTH, 0.60, 0.72))
    return [*asked, Goal(f"{row.operation}, any M", BITSANDBYTES, 0.95, 1.2)]
