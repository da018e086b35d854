"""Inline PTX run instruction by instruction, on jax arrays."""

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from q4jax.core.arithmetic import divide


def emulate(asm: str, args: Sequence[Array], dtype: DTypeLike) -> Array:
    """Compute the result of `inline_asm`, instruction by instruction."""
    registers: dict[str, Array] = {f"${i + 1}": _bits(a) for i, a in enumerate(args)}
    for line in re.split(r"[;{}]\s*", asm):
        operation, _, operands = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *sources = (name.strip() for name in operands.split(","))
        values = [registers[s] if s in registers else _immediate(s) for s in sources]
        registers[target] = _INSTRUCTIONS[operation](*values)
    return lax.bitcast_convert_type(registers["$0"], jnp.dtype(dtype))


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.float32)


def _immediate(text: str) -> Any:
    value = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
    return np.uint32(value).view(np.int32)


def _float_instruction(f: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *args: _bits(f(*map(_float, args)))


def _add(a: Array, b: Array) -> Array:
    # A product next to the sum must not be contracted into it. The clip changes no sum of finite
    # terms that does not overflow, which the compiler cannot know.
    return jnp.clip(a, -jnp.abs(a), jnp.abs(a)) + b


def _convert_two(dtype: DTypeLike) -> Callable[[Array, Array], Array]:
    def convert(high: Array, low: Array) -> Array:
        pair = jnp.stack(jnp.broadcast_arrays(_float(low), _float(high)), -1).astype(dtype)
        return lax.bitcast_convert_type(pair, jnp.int32)

    return convert


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """`prmt`: nibble i of the selector says which of the 8 bytes of (b, a) becomes byte i.

    Where bit 3 of a nibble is set, it is that byte's sign, spread over a byte.
    """
    a, b, selector = jnp.broadcast_arrays(a, b, selector)
    source = lax.bitcast_convert_type(jnp.stack([a, b], -1), jnp.int8).reshape(*a.shape, 8)
    source = jnp.concatenate([source, source >> 7], -1)
    index = (selector[..., None] >> np.arange(0, 16, 4)) & 15
    picked = jnp.take_along_axis(source, index, -1, mode="promise_in_bounds")
    return lax.bitcast_convert_type(picked, jnp.int32)


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """`lop3`: bit 4a + 2b + c of the truth table, for each bit."""
    result = jnp.zeros_like(a)
    for case in range(8):
        if int(table) >> case & 1:
            bits = (v if case >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0)))
            result |= functools.reduce(operator.and_, bits)
    return result


def _multiply_high(a: Array, b: Array) -> Array:
    """The high 32 bits of the product of two unsigned integers."""
    a, b = (lax.bitcast_convert_type(jnp.asarray(v), jnp.uint32) for v in (a, b))
    low = (a & 0xFFFF) * (b & 0xFFFF)
    middle = (a >> 16) * (b & 0xFFFF) + (low >> 16)
    other = (a & 0xFFFF) * (b >> 16) + (middle & 0xFFFF)
    high = (a >> 16) * (b >> 16) + (middle >> 16) + (other >> 16)
    return lax.bitcast_convert_type(high, jnp.int32)


_INSTRUCTIONS: dict[str, Callable[..., Array]] = {
    "mul.rn.f32": _float_instruction(lambda a, b: a * b),
    "add.rn.f32": _float_instruction(_add),
    "rcp.rn.f32": _float_instruction(lambda a: divide(jnp.ones_like(a), a)),
    "div.rn.f32": _float_instruction(divide),
    "cvt.rn.bf16x2.f32": _convert_two(jnp.bfloat16),
    "cvt.rn.f16x2.f32": _convert_two(jnp.float16),
    "and.b32": lambda a, b: a & b,
    "mul.hi.u32": _multiply_high,
    "mad.hi.u32": lambda a, b, c: _multiply_high(a, b) + c,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _permute,
    "lop3.b32": _logic,
}
