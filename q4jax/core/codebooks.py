"""The number formats: the 4-bit codebooks by quant type, and the signed 8-bit map of nested scales.

To add a quant type, add a `Codebook` to `CODEBOOKS`. The PTX and the C++ kernels are given its
tables from here.
"""

import dataclasses
import functools

import numpy as np
from numpy.typing import ArrayLike

QuantType = str
"""A key of `CODEBOOKS`: "nf4" or "fp4"."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
"""Block length of the second quantization, fixed in every file bitsandbytes writes."""


def _float32(values: ArrayLike) -> np.ndarray:
    table = np.asarray(values, np.float32)
    table.flags.writeable = False
    return table


def _midpoints(ascending: np.ndarray) -> np.ndarray:
    """Compute the float32 midpoints of neighbouring values, in float32."""
    return _float32((ascending[:-1] + ascending[1:]) * np.float32(0.5))


def _uint8(values: ArrayLike) -> np.ndarray:
    table = np.asarray(values, np.uint8)
    table.flags.writeable = False
    return table


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """A 4-bit format: the value of each code, and the code of each value in [-1, 1].

    A value takes the entry of `sorted_codes` at the number of `thresholds` strictly below it, so
    a value on a threshold takes the lower neighbour.

    Attributes:
      name: the quant type: lower-case letters and digits.
      values: float32 `[16]`, indexed by the 4-bit code.
      sorted_codes: uint8 `[16]`, the codes in ascending order of their values.
    """

    name: str
    values: np.ndarray
    sorted_codes: np.ndarray

    @functools.cached_property
    def thresholds(self) -> np.ndarray:
        """Midpoints of neighbouring values, float32 `[15]`, ascending."""
        return _midpoints(self.values[self.sorted_codes])


# QLoRA (arXiv:2305.14314), appendix E: quantiles of N(0, 1), normalised so that 0 and ±1 are exact.
_NF4 = _float32(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)

# Sign bit, two exponent bits, one mantissa bit; entry 1 is the subnormal. Scaled so that 12 is 1.
_FP4_MAGNITUDES = np.asarray([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
# Code 8, "minus zero", decodes to +0.0.
_FP4 = _float32(np.concatenate([_FP4_MAGNITUDES, 0.0 - _FP4_MAGNITUDES]))

# Intervals of fp4 in ascending order of value. The interval just below zero takes code 0 and the
# one just above it code 8: what bitsandbytes' CPU backend writes.
_FP4_SORTED_CODES = _uint8([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3])

CODEBOOKS: dict[str, Codebook] = {
    "nf4": Codebook("nf4", _NF4, _uint8(np.arange(16))),
    "fp4": Codebook("fp4", _FP4, _FP4_SORTED_CODES),
}
"""quant type -> its codebook, in the order in which errors name them."""


def check_quant_type(value: object, name: str = "quant_type") -> None:
    """Raise ValueError, with `name`, unless `value` is a key of `CODEBOOKS`."""
    if not isinstance(value, str) or value not in CODEBOOKS:
        allowed = " or ".join(map(repr, CODEBOOKS))
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _edges(intervals: int) -> np.ndarray:
    """Return `intervals + 1` points from 0.1 to 1, with the rounding of bitsandbytes' files.

    The step is a float32; each point counts from the nearer end and is rounded once (numpy's
    linspace differs in the last bit of 22 entries of the map).
    """
    start, stop = float(np.float32(0.1)), 1.0
    step = float((np.float32(stop) - np.float32(start)) / np.float32(intervals))
    i = np.arange(intervals + 1)
    lower_half = i < (intervals + 1) // 2
    return np.where(lower_half, start + step * i, stop - step * (intervals - i)).astype(np.float32)


def _dynamic_map() -> np.ndarray:
    """Compute the signed dynamic 8-bit map of "8-bit Optimizers" (arXiv:2110.02861), float32 [256].

    A sign bit, then a unary decimal exponent, then a linear fraction in the bits that remain:
    seven decades, the e-th holding 2**e evenly spaced magnitudes, and 0 and +1 beside them.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _edges(2**exponent)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (exponent - 6)) * means
        values += [*magnitudes, *(-magnitudes)]
    return _float32(np.sort(np.asarray(values, np.float32)))


DYNAMIC_MAP: np.ndarray = _dynamic_map()
"""float32 [256], ascending; entry 127 is 0.0 and entry 255 is 1.0."""

DYNAMIC_THRESHOLDS: np.ndarray = _midpoints(DYNAMIC_MAP)
"""float32 [255], ascending."""
