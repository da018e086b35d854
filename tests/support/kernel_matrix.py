"""The calls on which every kernel is compared with the reference, in interpret mode."""

import dataclasses
import itertools
import random

DTYPES = ("float32", "float16", "bfloat16")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = ("nf4", "fp4")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `m` counts for the products only."""

    operation: str
    dtype: str
    quant_type: str
    blocksize: int
    nested: bool
    n: int
    k: int
    m: int = 0
    bias: bool = False

    @property
    def name(self) -> str:
        """All of it."""
        return "-".join(str(v) for v in dataclasses.astuple(self))


def _columns(blocksize: int) -> tuple[int, int]:
    """One row width below the tile's, and one that is not a multiple of it where that can be."""
    return blocksize, blocksize * (9 if blocksize == 32 else 5 if blocksize < 256 else 1)


def cases() -> list[Case]:
    """Over 1,000 of them, each different, in an order in which any first part is a fair sample."""
    found = []
    for dtype, quant_type, blocksize in itertools.product(DTYPES, TYPES, BLOCKSIZES):
        few, many = _columns(blocksize)
        base = (dtype, quant_type, blocksize)
        # One block; rows that do not fill a tile; a tile and more.
        for n, k in ((1, few), (7, many), (4096 // blocksize + 4, many)):
            found.append(Case("quantize", *base, False, n, k))
        for nested, (n, k) in itertools.product((False, True), ((1, few), (9, many))):
            found.append(Case("dequantize", *base, nested, n, k))
        # Rows of x below, at and above a tile; rows of W below and above one, and ragged.
        for nested, (m, n, k) in itertools.product(
            (False, True), ((1, 70, many), (17, 64, few), (3, 129, many))
        ):
            found.append(Case("linear", *base, nested, n, k, m, bias=m != 17))
            found.append(Case("linear_transpose", *base, nested, n, k, m))
    for dtype, nested, m in itertools.product(
        DTYPES, (False, True), (8, 16, 31, 33, 64, 65, 130, 200)
    ):
        found.append(Case("linear", dtype, "nf4", 64, nested, 130, 576, m, bias=True))
        found.append(Case("linear_transpose", dtype, "nf4", 64, nested, 130, 576, m))
    random.Random(0).shuffle(found)
    return found
