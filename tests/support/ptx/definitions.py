"""What instructions on numbers mean, in Python's integers and fractions: slow, without numpy."""

import operator
from fractions import Fraction

# Bits of the mantissa, least and largest exponent of a last place and of a number.
FORMATS = {"f32": (24, -149, 128), "f16": (11, -24, 16), "bf16": (8, -133, 128)}
NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}


def signed(value: int, width: int) -> int:
    """The number that `width` bits stand for in two's complement."""
    return value - (value >> (width - 1) << width)


def width_of(kind: str) -> int:
    """The bits of a type."""
    return 1 if kind == "pred" else int(kind.lstrip("bsuf"))


def integer(bits: int, kind: str) -> int:
    """The number that bits of an integer type stand for."""
    return signed(bits, width_of(kind)) if kind[0] == "s" else bits


def number(bits: int, kind: str):
    """The number that bits of a float type stand for: a Fraction, or a float if not finite."""
    digits, least, largest = FORMATS[kind]
    exponents = largest.bit_length()
    sign = -1 if bits >> (exponents + digits - 1) else 1
    exponent, mantissa = bits >> (digits - 1) & (1 << exponents) - 1, bits & (1 << digits - 1) - 1
    if exponent == (1 << exponents) - 1:
        return float("nan") if mantissa else sign * float("inf")
    if exponent:
        mantissa, exponent = mantissa + (1 << digits - 1), exponent - 1
    return sign * mantissa * Fraction(2) ** (exponent + least)


def rounded(value: Fraction, kind: str, negative_zero: bool = False) -> int:
    """The bits of the nearest number, of two the even one."""
    digits, least, largest = FORMATS[kind]
    exponents = largest.bit_length()
    sign = int(value < 0 or (value == 0 and negative_zero)) << (exponents + digits - 1)
    value = abs(value)
    if not value:
        return sign
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < Fraction(2) ** exponent  # 2^exponent <= value
    last = max(exponent - digits + 1, least)
    mantissa = round(value / Fraction(2) ** last)  # to even
    # Without its leading bit a mantissa continues the exponent.
    bits = mantissa + (last - least << digits - 1)
    return sign | min(bits, (1 << exponents) - 1 << digits - 1)


def prmt(a: int, b: int, selector: int) -> int:
    """Bytes of (b, a) by nibbles."""
    source = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return result


def _bit_field(kind: str):
    width = width_of(kind)

    def field(a: int, start: int, length: int) -> int:
        """Bits of `a`; what is above them, or above the number, is the field's sign, or 0."""
        start, length = start & 255, length & 255
        last = min(start + length - 1, width - 1)
        sign = a >> last & 1 if kind[0] == "s" and length else 0
        bits = range(width)
        inside = [i < length and start + i < width for i in bits]
        return sum((a >> start + i & 1 if inside[i] else sign) << i for i in bits)

    return field


def _truncating(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def on_integers(name: str, kind: str):
    """The function of an instruction such as "add" of a type; results are cut to their width."""
    if kind.endswith("16x2"):
        half = on_integers(name, kind.removesuffix("x2"))
        return lambda a, b: half(a & 0xFFFF, b & 0xFFFF) & 0xFFFF | half(a >> 16, b >> 16) << 16
    width = width_of(kind)
    functions = {
        "add": operator.add,
        "sub": operator.sub,
        "mul.lo": operator.mul,
        "mul.wide": operator.mul,
        "mul.hi": lambda a, b: a * b >> width,
        "mad.lo": lambda a, b, c: a * b + c,
        "mad.hi": lambda a, b, c: (a * b >> width) + c,
        "mad.wide": lambda a, b, c: a * b + c,
        "min": min,
        "max": max,
        "div": lambda a, b: _truncating(a, b) if b else -1,
        "rem": lambda a, b: a - b * _truncating(a, b) if b else a - b * -1,
        "neg": operator.neg,
        "abs": abs,
        "and": operator.and_,
        "or": operator.or_,
        "xor": operator.xor,
        "not": operator.invert,
        "shl": lambda a, b: a << min(b, width),
        "shr": lambda a, b: a >> min(b, width),
        "shf.l.clamp": lambda a, b, c: (a | b << 32) << min(c, 32) >> 32,
        "shf.r.clamp": lambda a, b, c: (a | b << 32) >> min(c, 32),
        "shf.l.wrap": lambda a, b, c: (a | b << 32) << c % 32 >> 32,
        "shf.r.wrap": lambda a, b, c: (a | b << 32) >> c % 32,
        "bfe": _bit_field(kind),
        "prmt": prmt,
        "selp": lambda a, b, c: a if c else b,
        "cvta.to.global": lambda address: address,
        "cvta.param": lambda address: address,
    }
    word, _, rest = name.partition(".")
    if word != "setp":
        return functions[name]
    compare, _, combine = rest.partition(".")
    if combine:
        return lambda a, b, c: COMBINE[combine](int(COMPARE[compare](a, b)), c)
    return COMPARE[compare]
