"""Bits: logic, shifts, permutations of bytes, comparisons and selections."""

import operator

import numpy as np

from tests.support.ptx.faults import Unknown
from tests.support.ptx.instructions.table import TABLE, Definition, define
from tests.support.ptx.parser import Immediate

for kind in ("pred", "b16", "b32", "b64"):
    define(f"and.{kind}", f"{kind} = {kind} {kind}", np.bitwise_and)
    define(f"or.{kind}", f"{kind} = {kind} {kind}", np.bitwise_or)
    define(f"xor.{kind}", f"{kind} = {kind} {kind}", np.bitwise_xor)
    define(f"not.{kind}", f"{kind} = {kind}", np.invert)


def _shift(function):
    """A shift whose amount is unsigned, and at least the width means all of it."""

    def shift(a, by):
        a = np.asarray(a)
        width = 8 * a.itemsize
        within = np.minimum(by, width - 1).astype(a.dtype)
        rest = a >> a.dtype.type(width - 1) if a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(by >= width, rest, function(a, within))

    return shift


for width in (16, 32, 64):
    define(f"shl.b{width}", f"u{width} = u{width} u32", _shift(np.left_shift))
    define(f"shr.b{width}", f"u{width} = u{width} u32", _shift(np.right_shift))
    define(f"shr.u{width}", f"u{width} = u{width} u32", _shift(np.right_shift))
    define(f"shr.s{width}", f"s{width} = s{width} u32", _shift(np.right_shift))


def _funnel(left, amount):
    """32 of the 64 bits of (b, a), after a shift."""

    def shift(a, b, by):
        both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
        by = amount(np.asarray(by)).astype(np.uint64)
        result = (both << by) >> np.uint64(32) if left else both >> by
        return result.astype(np.uint32)

    return shift


for letter in "lr":
    clamped, wrapped = (lambda by: np.minimum(by, 32)), (lambda by: by & 31)
    define(f"shf.{letter}.clamp.b32", "u32 = u32 u32 u32", _funnel(letter == "l", clamped))
    define(f"shf.{letter}.wrap.b32", "u32 = u32 u32 u32", _funnel(letter == "l", wrapped))


def _field(a, start, length):
    """`length` bits of `a` from bit `start` on, and the sign of the field, or 0, above them."""
    a = np.asarray(a)
    start, length = (np.minimum(by & 255, 32) for by in np.broadcast_arrays(start, length))
    signed = a.dtype.kind == "i"
    wide = a.astype(np.int64) << np.int64(32) >> np.int64(32) if signed else a.astype(np.int64)
    up = 64 - np.minimum(length, 64).astype(np.int64)
    field = (wide >> start.astype(np.int64)).view(np.int64 if signed else np.uint64)
    # Shifted up and down again, so that the uppermost bit of the field fills what is above it.
    up = np.minimum(up, 63).astype(field.dtype)
    return np.where(length == 0, 0, field << up >> up).astype(a.dtype)


def _wide_field(a, start, length):
    """The same of 64 bits without a sign."""
    start, length = (np.asarray(by & 255).astype(np.uint64) for by in (start, length))
    one, most = np.uint64(1), np.uint64(63)
    moved = np.where(start > most, np.uint64(0), a >> np.minimum(start, most))
    mask = np.where(length > most, ~np.uint64(0), (one << np.minimum(length, most)) - one)
    return moved & mask


for kind in ("u32", "s32"):
    define(f"bfe.{kind}", f"{kind} = {kind} u32 u32", _field)
define("bfe.u64", "u64 = u64 u32 u32", _wide_field)


def permute(a, b, selector):
    """Byte i of the result is the one of (b, a) that nibble i names; its bit 3 spreads the sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    source = np.stack([a, b], -1).view(np.uint8)  # [..., 8]
    picks = (selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    picked = np.take_along_axis(source, (picks & 7).astype(np.intp), -1)
    sign = (picked.view(np.int8) >> 7).view(np.uint8)
    return np.where(picks & 8, sign, picked).view(np.uint32)[..., 0]


define("prmt.b32", "u32 = u32 u32 u32", permute)


def _lop3(machine, target, a, b, c, table):
    """Any function of three bits, as its truth table."""
    if not isinstance(table, Immediate):
        raise Unknown("a truth table that is no constant")
    a, b, c = (machine.get(operand, "u32") for operand in (a, b, c))
    result = np.uint32(0)
    for case in range(8):
        if table.value >> case & 1:
            x, y, z = (v if case & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | (x & y & z)
    machine.put(target, result)


TABLE["lop3.b32", 5] = Definition(_lop3, ("u32",) * 5)

_ORDER = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _define_comparison(name, kind, compare):
    define(f"setp.{name}.{kind}", f"pred = {kind} {kind}", compare)
    for word, combine in _COMBINE.items():

        def both(a, b, c, combine=combine):
            return combine(compare(a, b), c)

        define(f"setp.{name}.{word}.{kind}", f"pred = {kind} {kind} pred", both)


def _ordered(compare):
    """False where an operand is NaN."""
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


def _unordered(compare):
    """True where an operand is NaN."""
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


for name, compare in _ORDER.items():
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        _define_comparison(name, kind, compare)
    _define_comparison(name, "f32", _ordered(compare))
    _define_comparison(f"{name}u", "f32", _unordered(compare))
    if name in ("eq", "ne"):
        for kind in ("b16", "b32", "b64"):
            _define_comparison(name, kind, compare)
_define_comparison("nan", "f32", lambda a, b: np.isnan(a) | np.isnan(b))
_define_comparison("num", "f32", lambda a, b: ~(np.isnan(a) | np.isnan(b)))

for kind in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64"):
    define(f"selp.{kind}", f"{kind} = {kind} {kind} pred", lambda a, b, c: np.where(c, a, b))
