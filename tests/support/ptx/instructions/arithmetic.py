"""Arithmetic on integers and on floats.

Floating point is IEEE's, subnormal numbers included: forms that flush them (`.ftz`) or that
approximate are not in the table. Nor is `mul.f32` without a rounding, which the assembler may fuse
with a sum. Without it, a sum that names no rounding has nothing to be fused with.
"""

import numpy as np

from tests.support.ptx.instructions.table import define
from tests.support.ptx.scalar_types import TYPES

_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_NAN = np.uint32(0x7FFFFFFF).view(np.float32)  # the only NaN that arithmetic yields


def _divide(a, b):
    """Toward zero. Hardware leaves x / 0 undefined; here it is all ones."""
    a, b = np.broadcast_arrays(a, b)
    # Numpy rounds down, and has no quotient for x / 0 and for the least number / -1.
    special = (b == 0) | (b == ~np.zeros((), a.dtype))
    safe = np.where(special, 1, b).astype(a.dtype)
    quotient = a // safe
    inexact = quotient * safe != a
    quotient = np.where(inexact & ((a < 0) != (safe < 0)), quotient + 1, quotient)
    by_last = -a if a.dtype.kind == "i" else (a == b)
    result = np.where(b == 0, ~np.zeros((), a.dtype), np.where(special, by_last, quotient))
    return result.astype(a.dtype)


def _remainder(a, b):
    return a - _divide(a, b) * b


def _add_halves(a, b):
    """Two sums of 16 bits."""
    low, high = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    return ((a & low) + (b & low) & low) | ((a & high) + (b & high))


def _high(wide):
    def multiply(a, b):
        narrow = np.asarray(a).dtype
        product = np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
        return (product >> wide.type(8 * narrow.itemsize)).astype(narrow)

    return multiply


def _multiply_wide(wide):
    return lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide)


def _multiply_add_wide(wide):
    return lambda a, b, c: np.asarray(a).astype(wide) * np.asarray(b).astype(wide) + c


def _high_and_add(wide):
    high = _high(wide)
    return lambda a, b, c: high(a, b) + c


for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
    two = f"{kind} = {kind} {kind}"
    define(f"add.{kind}", two, np.add)
    define(f"sub.{kind}", two, np.subtract)
    define(f"mul.lo.{kind}", two, np.multiply)
    define(f"mad.lo.{kind}", f"{two} {kind}", lambda a, b, c: a * b + c)
    define(f"min.{kind}", two, np.minimum)
    define(f"max.{kind}", two, np.maximum)
    define(f"div.{kind}", two, _divide)
    define(f"rem.{kind}", two, _remainder)
    if kind[0] == "s":
        define(f"neg.{kind}", f"{kind} = {kind}", np.negative)
        define(f"abs.{kind}", f"{kind} = {kind}", np.abs)
define("add.s16x2", "u32 = u32 u32", _add_halves)
define("add.u16x2", "u32 = u32 u32", _add_halves)
for kind, wide in _WIDE.items():
    dtype = TYPES[wide]
    define(f"mul.hi.{kind}", f"{kind} = {kind} {kind}", _high(dtype))
    define(f"mad.hi.{kind}", f"{kind} = {kind} {kind} {kind}", _high_and_add(dtype))
    define(f"mul.wide.{kind}", f"{wide} = {kind} {kind}", _multiply_wide(dtype))
    define(f"mad.wide.{kind}", f"{wide} = {kind} {kind} {wide}", _multiply_add_wide(dtype))


def _one_nan(function):
    """The function, with every NaN of its result replaced by hardware's."""

    def compute(*operands):
        result = function(*operands)
        nan = np.isnan(result)
        return np.where(nan, _NAN, result) if nan.any() else result

    return compute


def fused(a, b, c):
    """a * b + c in float32, rounded once.

    The product is exact in float64. Where the sum, rounded there, is near the middle of two float32
    numbers or below the normal ones, the error of the sum decides, which rounding to odd keeps.
    """
    product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = np.asarray(product + c)
    halfway = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if not (halfway | (np.abs(total) < 2.0**-125)).any():
        return total.astype(np.float32)
    part = total - product
    error = (product - (total - part)) + (c - part)  # exact (Knuth's two-sum)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & even & np.isfinite(total), np.nextafter(total, toward), total)
    return odd.astype(np.float32)


def _extreme(pick, zeros):
    """min or max: a number wins over NaN, and -0 is less than +0."""

    def choose(a, b):
        a, b = np.broadcast_arrays(a, b)
        same = zeros(a.view(np.uint32), b.view(np.uint32)).view(np.float32)
        return np.where(a == b, same, pick(a, b))

    return choose


one, two, three = "f32 = f32", "f32 = f32 f32", "f32 = f32 f32 f32"
for rounding in ("", ".rn"):
    define(f"add{rounding}.f32", two, _one_nan(np.add))
    define(f"sub{rounding}.f32", two, _one_nan(np.subtract))
define("mul.rn.f32", two, _one_nan(np.multiply))
define("div.rn.f32", two, _one_nan(np.divide))
define("rcp.rn.f32", one, _one_nan(lambda a: np.float32(1) / a))
define("fma.rn.f32", three, _one_nan(fused))
for name, extreme in {
    "min": _extreme(np.fmin, np.bitwise_or),
    "max": _extreme(np.fmax, np.bitwise_and),
}.items():
    define(f"{name}.f32", two, _one_nan(extreme))
    define(f"{name}.f32", three, _one_nan(lambda a, b, c, of=extreme: of(of(a, b), c)))
for half in ("f16", "bf16"):
    mixed = f"f32 = {half} f32"
    define(f"add.rn.f32.{half}", mixed, _one_nan(lambda a, b: np.asarray(a, np.float32) + b))
define("neg.f32", one, np.negative)
define("abs.f32", one, np.abs)
