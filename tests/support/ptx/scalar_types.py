"""PTX's scalar types as numpy dtypes, and the conversions that numpy does otherwise."""

import ml_dtypes
import numpy as np

TYPES = {
    "pred": np.dtype(np.bool_),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
}
UNSIGNED = {bits: TYPES[f"u{bits}"] for bits in (8, 16, 32, 64)}


def bits_of(kind: str) -> int:
    """The width of a type; a predicate has 1."""
    return 1 if kind == "pred" else 8 * TYPES[kind].itemsize


def storage(kind: str) -> np.dtype:
    """The dtype in which a register of this type is kept: untyped bits."""
    return TYPES["pred"] if kind == "pred" else UNSIGNED[bits_of(kind)]


def bits(value):
    """An array as unsigned integers of its width."""
    value = np.asarray(value)
    return value if value.dtype == bool else value.view(UNSIGNED[8 * value.dtype.itemsize])


def round_to(value, kind: str):
    """float32 -> bf16 or f16, to nearest even; NaN becomes the one that `cvt` gives."""
    value = np.asarray(value, np.float32)
    rounded = value.astype(TYPES[kind])
    canonical = np.uint16(0x7FFF).view(TYPES[kind])
    return np.where(np.isnan(value), canonical, rounded)


def halves(words, kind: str):
    """32-bit registers [...] -> their two elements as float32 [..., 2], the low one first."""
    words = np.ascontiguousarray(words, np.uint32)[..., None]
    return words.view(TYPES[kind]).astype(np.float32)
