"""Division that rounds as IEEE 754 says, by integers: a TPU's own is approximate.

Only shifts, comparisons, sums and bits of int32, which every platform computes alike.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_FRACTION_BITS, _BIAS = 23, 127
_FRACTION = np.int32((1 << _FRACTION_BITS) - 1)
_HIDDEN_BIT = np.int32(1 << _FRACTION_BITS)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF, _NAN = np.int32(0x7F800000), np.int32(0x7FC00000)


def divide(x: Array, by: Array) -> Array:
    """Return x / by, float32 of one shape, rounded to nearest; subnormal numbers are zeros.

    The quotient of two significands is found bit by bit: 25 of them, of which the last says how to
    round, as no quotient is half way between two numbers.
    """
    x_bits, by_bits = _bits(x), _bits(by)
    sign = (x_bits ^ by_bits) & ~_MAGNITUDE
    x_bits, by_bits = x_bits & _MAGNITUDE, by_bits & _MAGNITUDE
    x_exponent, by_exponent = x_bits >> _FRACTION_BITS, by_bits >> _FRACTION_BITS
    rest = (x_bits & _FRACTION) | _HIDDEN_BIT
    denominator = (by_bits & _FRACTION) | _HIDDEN_BIT
    below_1 = (rest < denominator).astype(jnp.int32)
    rest = (rest << below_1) - denominator  # the quotient's first bit is 1
    exponent = x_exponent - by_exponent + _BIAS - below_1

    def bit(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, quotient = carry
        rest = rest << 1
        one = rest >= denominator
        rest = jnp.where(one, rest - denominator, rest)
        return rest, (quotient << 1) | one.astype(jnp.int32)

    _, quotient = lax.fori_loop(0, _FRACTION_BITS + 1, bit, (rest, jnp.ones_like(rest)))
    found = (exponent << _FRACTION_BITS) + ((quotient + 1) >> 1) - _HIDDEN_BIT
    found = jnp.where(exponent <= 0, 0, jnp.where(exponent >= 255, _INF, found))

    zero, infinite = x_exponent == 0, x_bits == _INF
    by_zero, by_infinite = by_exponent == 0, by_bits == _INF
    found = jnp.where(zero | by_infinite, 0, jnp.where(infinite | by_zero, _INF, found))
    undefined = (zero & by_zero) | (infinite & by_infinite) | (x_bits > _INF) | (by_bits > _INF)
    return lax.bitcast_convert_type(jnp.where(undefined, _NAN, found | sign), jnp.float32)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)
