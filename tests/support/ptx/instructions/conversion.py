"""Conversions between types."""

import numpy as np

from tests.support.ptx.instructions.table import TABLE, Definition, define
from tests.support.ptx.scalar_types import TYPES, bits, round_to

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _define(opcode, source, function):
    """A conversion, whose registers may be wider than its types."""

    def run(machine, target, operand):
        machine.put(target, function(machine.get(operand, source)))

    TABLE[opcode, 2] = Definition(run)


def _to_integer(dtype):
    """Truncate, or extend by the sign of the source."""
    return lambda value: np.asarray(value).astype(dtype)


def _round_to_integer(dtype, rounding):
    """Round and clamp; NaN becomes 0, in 64 bits the top bit."""
    info = np.iinfo(dtype)
    nan = dtype.type(0) if dtype.itemsize < 8 else np.uint64(1 << 63).view(dtype)

    def convert(value):
        value = rounding(np.asarray(value, np.float64))
        # float64 has no number that is the largest of 64 bits.
        large, small = value >= float(info.max), value <= float(info.min)
        result = np.where(np.isnan(value) | large | small, 0, value).astype(dtype)
        result = np.where(large, info.max, np.where(small, info.min, result))
        return np.where(np.isnan(value), nan, result.astype(dtype))

    return convert


for source in INTEGERS:
    for target in INTEGERS:
        if source != target:
            _define(f"cvt.{target}.{source}", source, _to_integer(TYPES[target]))
    _define(f"cvt.rn.f32.{source}", source, _to_integer(TYPES["f32"]))
for target in ("u16", "s16", "u32", "s32", "u64", "s64"):
    for name, rounding in _ROUND.items():
        _define(f"cvt.{name}.{target}.f32", "f32", _round_to_integer(TYPES[target], rounding))
for half in ("f16", "bf16"):
    define(f"cvt.f32.{half}", f"f32 = {half}", lambda value: np.asarray(value, np.float32))
    define(f"cvt.rn.{half}.f32", f"{half} = f32", lambda value, half=half: round_to(value, half))

    def two(high, low, half=half):
        """The first source becomes the high half."""
        high, low = (bits(round_to(v, half)).astype(np.uint32) for v in (high, low))
        return low | high << np.uint32(16)

    define(f"cvt.rn.{half}x2.f32", "u32 = f32 f32", two)
