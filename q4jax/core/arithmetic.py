"""Float32 arithmetic that gives the same bits on every platform.

XLA's CPU backend rounds as IEEE 754 says and takes subnormal numbers for zero. For GPUs it keeps
subnormal numbers, multiplies and adds as IEEE 754 says, but divides approximately: it writes the
instructions `div.full.f32` and `rcp.approx.f32`, which are off in the last bit now and then.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_FRACTION_BITS = 23
_BIAS = 127
_SIGN, _MAGNITUDE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_HIDDEN_BIT = np.uint32(1 << _FRACTION_BITS)
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal


class Arithmetic(NamedTuple):
    """The operations in which XLA's backends differ.

    Attributes:
      flush: x -> the same, with zeros for subnormal numbers.
      reciprocal: x -> 1 / x, rounded to nearest.
      divide: x, by -> x / by, rounded to nearest, for a `by` that broadcasts to x.
    """

    flush: Callable[[Array], Array]
    reciprocal: Callable[[Array], Array]
    divide: Callable[[Array, Array], Array]


def divide(x: Array, by: Array) -> Array:
    """Divide as IEEE 754 says on CPU, also by a broadcast denominator.

    XLA turns a division by a broadcast into a product with the reciprocal, unless it cannot see
    that it is one.
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(by, x.shape))


def flush(x: Array) -> Array:
    """Replace subnormal numbers by zeros of their sign, whatever the platform does with them."""
    return jnp.where(jnp.abs(x) < _SMALLEST_NORMAL, x * 0, x)


def long_division(x: Array, by: Array, digit_bits: int = 8) -> Array:
    """Divide as IEEE 754 says, by integers: float32 operands of one shape, rounded to nearest.

    Subnormal numbers count as zero, and so does a quotient that would be one. Significands are
    divided by hand, a few bits at a time: a remainder is below 2^24, so 32 bits hold the next step.

    Args:
      x: the numerator.
      by: the denominator.
      digit_bits: 8, or 1 where the platform has no division of integers.
    """
    x_bits, by_bits = (lax.bitcast_convert_type(a, jnp.uint32) for a in (x, by))
    rest, denominator = _significand(x_bits), _significand(by_bits)
    exponent = _exponent(x_bits) - _exponent(by_bits) + _BIAS
    below_1 = rest < denominator
    rest = jnp.where(below_1, rest << 1, rest)
    exponent -= below_1.astype(jnp.int32)

    # In [1, 2) times 2^24, rounded down: the significand and one bit more.
    quotient = jnp.ones_like(rest)
    rest -= denominator
    for _ in range(24 // digit_bits):
        rest <<= digit_bits
        fits = rest >= denominator
        digit = fits.astype(jnp.uint32) if digit_bits == 1 else rest // denominator
        rest -= jnp.where(fits, denominator, 0) if digit_bits == 1 else digit * denominator
        quotient = (quotient << digit_bits) | digit
    # No quotient of two significands is half way between two others, so the bit tells where to go.
    significand = (quotient + 1) >> 1
    bits = (exponent.astype(jnp.uint32) << _FRACTION_BITS) + (significand - _HIDDEN_BIT)
    bits = jnp.where(exponent > 0, jnp.where(exponent < 255, bits, np.uint32(0x7F800000)), 0)
    found = lax.bitcast_convert_type(bits | ((x_bits ^ by_bits) & _SIGN), jnp.float32)
    regular = (_exponent(x_bits) % 255 != 0) & (_exponent(by_bits) % 255 != 0)
    return jnp.where(regular, found, flush(x) * _reciprocal_of_special(by, by_bits))


def _significand(bits: Array) -> Array:
    return (bits & (_HIDDEN_BIT - 1)) | _HIDDEN_BIT


def _exponent(bits: Array) -> Array:
    """The biased exponent, int32: 0 for zeros and subnormal numbers, 255 for inf and NaN."""
    return ((bits & _MAGNITUDE) >> _FRACTION_BITS).astype(jnp.int32)


def _reciprocal_of_special(by: Array, bits: Array) -> Array:
    """What a zero, an inf, a NaN is multiplied by to be divided by `by`; any x, if `by` is one."""
    sign = bits & _SIGN
    exponent = _exponent(bits)
    magnitude = jnp.where(exponent == 0, np.float32(np.inf), np.float32(1))
    magnitude = jnp.where(jnp.isinf(by), np.float32(0), magnitude)
    signed = lax.bitcast_convert_type(
        lax.bitcast_convert_type(magnitude, jnp.uint32) | sign, jnp.float32
    )
    return jnp.where(jnp.isnan(by), by, signed)


CPU = Arithmetic(flush=lambda x: x, reciprocal=lambda x: 1.0 / x, divide=divide)
"""The arithmetic of XLA's CPU backend, which has these properties by itself."""


def _by_integers(digit_bits: int) -> Arithmetic:
    return Arithmetic(
        flush=flush,
        reciprocal=lambda x: long_division(jnp.ones_like(x), x, digit_bits),
        divide=lambda x, by: long_division(x, jnp.broadcast_to(by, x.shape), digit_bits),
    )


PORTABLE = _by_integers(8)
"""The same results from operations that every backend computes exactly."""

TPU = _by_integers(1)
"""The same without divisions of integers, of which XLA makes long programs for TPUs."""
