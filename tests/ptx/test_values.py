"""Every instruction that computes a value of a thread's own ones, against its definition."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.support.ptx import definitions as meaning
from tests.support.ptx.instructions.conversion import INTEGERS
from tests.support.ptx.instructions.table import TABLE
from tests.support.ptx.programs import apply
from tests.support.ptx.scalar_types import bits_of

VALUES = {key: d.kinds for key, d in TABLE.items() if d.kinds and key[0] != "lop3.b32"}
ON_FLOATS = {key: kinds for key, kinds in VALUES.items() if "f32" in kinds and key[0][:4] != "selp"}
ON_INTEGERS = {key: kinds for key, kinds in VALUES.items() if key not in ON_FLOATS}
NAN = float("nan")


def samples(kind, seed, count=224):
    """Bits of a type: the ends of its range, small numbers, random ones; in a random order."""
    rng, width = np.random.default_rng(seed), bits_of(kind)
    if kind == "pred":
        return rng.integers(0, 2, count, np.uint8)
    edges = [0, 1, 2, 31, 32, 33, 2 ** (width - 1) - 1, 2 ** (width - 1), 2**width - 1]
    some = np.frombuffer(rng.bytes(count * width // 8), f"u{width // 8}").copy()
    some[:100] %= 70
    some[: 3 * len(edges)] = np.resize(np.array(edges, np.uint64), 3 * len(edges))
    return rng.permutation(some)


def float_samples(kind, seed, count=960):
    """Random bits, numbers near 1, zeros, subnormal numbers, infinities and NaN."""
    rng, width = np.random.default_rng(seed), bits_of(kind)
    some = np.frombuffer(rng.bytes(count * width // 8), f"u{width // 8}").copy()
    one = {"f32": 0x3F800000, "bf16": 0x3F80, "f16": 0x3C00}[kind]
    sign = 1 << (width - 1)
    some[::4] = one + rng.integers(-40, 40, len(some[::4]))
    infinity = {"f32": 0x7F800000, "bf16": 0x7F80, "f16": 0x7C00}[kind]
    edges = [0, sign, 1, sign | 3, infinity, sign | infinity, infinity + 1, infinity - 1]
    some[1:65:2] = np.resize(np.array(edges, np.uint64), 32).astype(some.dtype)
    return rng.permutation(some)


@pytest.mark.parametrize("key", ON_INTEGERS, ids=lambda key: f"{key[0]}/{key[1]}")
def test_on_integers(key):
    result, *sources = ON_INTEGERS[key]
    arrays = [samples(kind, i) for i, kind in enumerate(sources)]
    name, _, kind = key[0].rpartition(".")
    kind = kind if kind != "f32" else "u32"  # selp copies bits
    function = meaning.on_integers(name, kind if kind != "pred" else "b1")
    rows = zip(*(a.tolist() for a in arrays), strict=True)
    modulus = 1 << bits_of(result)
    expected = []
    for row in rows:
        values = [
            meaning.integer(v, k if k not in ("f32", "pred") else "u32")
            for v, k in zip(row, sources, strict=True)
        ]
        expected.append(int(function(*values)) % modulus)
    found = apply(key[0], result, sources, *arrays)
    np.testing.assert_array_equal(found, np.array(expected, np.uint64).astype(found.dtype))


def add(a, b):
    return a + b


def divide(a, b):
    if math.isinf(b):
        return NAN if math.isinf(a) else 0.0
    if b == 0:
        return NAN if a == 0 else math.inf
    return a / b


def extreme(pick):
    """A number wins over NaN."""

    def choose(*values):
        numbers = [v for v in values if not math.isnan(v)]
        return pick(numbers) if numbers else NAN

    return choose


def subtract(a, b):
    return a - b


ARITHMETIC = {
    "add": add,
    "add.rn": add,
    "sub": subtract,
    "sub.rn": subtract,
    "mul.rn": lambda a, b: a * b,
    "div.rn": divide,
    "rcp.rn": lambda a: divide(Fraction(1), a),
    "fma.rn": lambda a, b, c: a * b + c,
    "min": extreme(min),
    "max": extreme(max),
    "add.rn.f32": add,
}


def arithmetic(name, values, signs):
    """The bits of a result; `signs` are those of the values, zeros included."""
    some_infinite = any(isinstance(v, float) for v in values)
    if some_infinite and name not in ("min", "max"):
        values = [float(np.sign(v)) if isinstance(v, Fraction) else v for v in values]
    result = ARITHMETIC[name](*values)
    word = name.partition(".")[0]
    if isinstance(result, float) and math.isnan(result):
        return meaning.NAN["f32"]
    product = signs[0] ^ signs[1] if len(signs) > 1 else signs[0]
    if word in ("div", "rcp") and (isinstance(result, float) or result == 0):
        size = 0x7F800000 if isinstance(result, float) and math.isinf(result) else 0
        return size | product << 31
    if isinstance(result, float) and math.isinf(result):
        return 0x7F800000 | int(result < 0) << 31
    negative = {
        "add": all(signs),
        "sub": signs[0] and not signs[-1],
        "mul": product,
        "fma": product and signs[-1],
        "min": any(s for v, s in zip(values, signs, strict=True) if v == 0),
        "max": all(s for v, s in zip(values, signs, strict=True) if v == 0),
    }
    return meaning.rounded(Fraction(result), "f32", bool(negative.get(word)))


def float_inputs(sources):
    arrays = [
        float_samples(k, i) if k != "pred" else samples(k, i, 960) for i, k in enumerate(sources)
    ]
    if len(arrays) == 3 and sources == ["f32"] * 3:
        # Sums that end near the middle of two numbers, and near the least normal one.
        a, b, c = (array.view(np.float32) for array in arrays)
        with np.errstate(all="ignore"):
            c[:200] = (
                (a * b)[:200] * np.float32(2.0**-24) * np.resize([1, 1.0001, -1, 3, 2**-20], 200)
            )
            c[200:300] = -(a * b)[200:300]
            b[300:400] = np.float32(2.0**-126) / a[300:400]
            c[300:400] *= np.float32(2.0**-140)
    return arrays


@pytest.mark.parametrize("key", ON_FLOATS, ids=lambda key: f"{key[0]}/{key[1]}")
def test_on_floats(key):
    result, *sources = ON_FLOATS[key]
    arrays = float_inputs(sources)
    found = apply(key[0], result, sources, *arrays)
    expected = [on_floats(key, row) for row in zip(*(a.tolist() for a in arrays), strict=True)]
    np.testing.assert_array_equal(found, np.array(expected, np.uint64).astype(found.dtype))


def on_floats(key, row):
    """The bits of the result of an instruction on a row of bits."""
    result, *sources = ON_FLOATS[key]
    values = [
        meaning.number(v, k) if k in meaning.FORMATS else v
        for v, k in zip(row, sources, strict=True)
    ]
    signs = [bool(v >> (bits_of(k) - 1)) for v, k in zip(row, sources, strict=True)]
    word, *rest = key[0].split(".")
    if word == "neg":
        return row[0] ^ 1 << 31
    if word == "abs":
        return row[0] & 0x7FFFFFFF
    if word == "setp":
        return compared(rest[0], rest[1] if len(rest) > 2 else None, *values)
    if word == "cvt":
        return converted(result, rest, row, values)
    name = key[0].rpartition(".")[0]
    return arithmetic(name, values, signs)


def compared(name, combine, a, b, c=0):
    nan = math.isnan(a) or math.isnan(b)
    if name in ("nan", "num"):
        outcome = nan == (name == "nan")
    else:
        unordered = name.endswith("u")
        outcome = unordered if nan else meaning.COMPARE[name.removesuffix("u")](a, b)
    return meaning.COMBINE[combine](int(outcome), int(c)) if combine else int(outcome)


def rounded_or_special(value, kind, bits):
    """`rounded`, of what need not be finite."""
    if math.isnan(value):
        return meaning.NAN[kind]
    digits, _, largest = meaning.FORMATS[kind]
    if math.isinf(value):
        return (1 << largest.bit_length()) - 1 << digits - 1 | int(value < 0) << bits_of(kind) - 1
    return meaning.rounded(value, kind, bool(bits >> 31))


def converted(result, rest, row, values):
    if rest[0] == "f32":  # from 16 bits: exact, payloads of NaN included
        if rest[1] == "bf16":
            return row[0] << 16
        sign = (row[0] >> 15) << 31
        if math.isnan(values[0]):
            return sign | 0x7F800000 | (row[0] & 0x3FF) << 13
        if math.isinf(values[0]):
            return sign | 0x7F800000
        return meaning.rounded(values[0], "f32", bool(sign))
    if rest[1].endswith("x2"):
        kind = rest[1].removesuffix("x2")
        high, low = (rounded_or_special(v, kind, b) for v, b in zip(values, row, strict=True))
        return high << 16 | low
    return rounded_or_special(values[0], result, row[0])


@pytest.mark.parametrize(("target", "source"), list(itertools.permutations(INTEGERS, 2)))
def test_conversions_of_integers(target, source):
    values = samples(source, 0)
    wide = target if bits_of(target) > 8 else f"{target[0]}32"
    found = apply(f"cvt.{target}.{source}", wide, [source], values)
    expected = [
        meaning.integer(meaning.integer(v, source) % 2 ** bits_of(target), target)
        % 2 ** bits_of(wide)
        for v in values.tolist()
    ]
    np.testing.assert_array_equal(found, np.array(expected, np.uint64).astype(found.dtype))


@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_floats(source):
    values = samples(source, 0, 960)
    found = apply(f"cvt.rn.f32.{source}", "f32", [source], values)
    expected = [
        meaning.rounded(Fraction(meaning.integer(v, source)), "f32") for v in values.tolist()
    ]
    np.testing.assert_array_equal(found, np.uint32(expected))


@pytest.mark.parametrize("target", [kind for kind in INTEGERS if kind[1:] != "8"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_floats_to_integers(rounding, target):
    values = float_samples("f32", 0)
    values[:400] = (np.float32(2.0**-1) * np.arange(-200, 200)).astype(np.float32).view(np.uint32)
    function = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding]
    width = bits_of(target)
    least, largest = (
        (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if target[0] == "s" else (0, 2**width - 1)
    )
    expected = []
    for v in values.tolist():
        value = meaning.number(v, "f32")
        if math.isnan(value):
            expected.append(0 if width < 64 else 2**63)
        else:
            whole = value if math.isinf(value) else function(value)
            expected.append(int(min(max(whole, least), largest)) % 2**width)
    found = apply(f"cvt.{rounding}.{target}.f32", target, ["f32"], values)
    np.testing.assert_array_equal(found, np.array(expected, np.uint64).astype(found.dtype))


@pytest.mark.parametrize("table", range(0, 256, 5))
def test_lop3(table):
    a, b, c = (samples("b32", i) for i in range(3))
    found = apply("lop3.b32", "b32", ["b32"] * 3, a, b, c, operands=f"%r1, %r2, %r3, {table:#x}")
    expected = [
        sum(
            (table >> (4 * (x >> i & 1) + 2 * (y >> i & 1) + (z >> i & 1)) & 1) << i
            for i in range(32)
        )
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(found, np.uint32(expected))


@pytest.mark.parametrize("constant", ["0x77777777", "-1", "5", "0f3F800000"])
def test_constants(constant):
    value = int(constant[2:], 16) if constant.startswith("0f") else int(constant, 0)
    found = apply("xor.b32", "b32", ["b32"], samples("b32", 0), operands=f"%r1, {constant}")
    np.testing.assert_array_equal(found, samples("b32", 0) ^ np.uint32(value % 2**32))
