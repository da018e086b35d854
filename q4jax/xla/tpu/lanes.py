"""Moves along the last axis, the lanes of a TPU's registers, as products with matrices of 0 and 1.

XLA moves single lanes slowly and multiplies matrices fast. A product of integers is exact, so the
bytes of numbers are moved, whatever they stand for: NaN and infinities stay where they are.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_GROUP = 256  # lanes that change places with each other: two registers side by side


def group_of(columns: int) -> int:
    """Return the number of lanes that change places with each other, a divisor of `columns`."""
    return math.gcd(columns, _GROUP)


def even_odd(x: Array) -> tuple[Array, Array]:
    """Split `x [M, K]`, K even, into its even and its odd columns, `[M, K/2]` each."""
    group = group_of(x.shape[1])
    even, odd = np.eye(group)[:, 0::2], np.eye(group)[:, 1::2]
    return _move(x, even), _move(x, odd)


def interleave(even: Array, odd: Array) -> Array:
    """Invert `even_odd`: `[M, K/2]` twice -> `[M, K]`."""
    group = group_of(2 * even.shape[1])
    back = np.eye(group).reshape(group // 2, 2, group)
    halves = zip(_bytes(even), _bytes(odd), strict=True)
    parts = [_dot(a, back[:, 0]) + _dot(b, back[:, 1]) for a, b in halves]
    return _join(parts, even.dtype)


def repeat(scales: Array, count: int) -> Array:
    """Repeat each column of float32 `scales [N, B]`: `[N, B * count]`."""
    blocks = scales.shape[1]
    group = max(n for n in range(1, 129) if blocks % n == 0)
    return _move(scales, np.repeat(np.eye(group), count, axis=1))


def pack(codes: Array) -> Array:
    """Pack 4-bit codes `[K, N]`, one a column of a row of W, into bytes `[N, K/2]`."""
    group = group_of(codes.shape[0])
    pairs = np.kron(np.eye(group // 2), [[16], [1]])
    grouped = codes.astype(jnp.int8).reshape(-1, group, codes.shape[1])
    contract = (((1,), (0,)), ((), ()))
    packed = lax.dot_general(
        grouped, jnp.asarray(pairs, jnp.int8), contract, preferred_element_type=jnp.int32
    )
    return jnp.moveaxis(packed, 0, 1).reshape(codes.shape[1], -1).astype(jnp.uint8)


def _move(x: Array, places: np.ndarray) -> Array:
    """Move the columns of each group: `[M, K]` -> `[M, K / len(places) * columns of places]`."""
    return _join([_dot(part, places) for part in _bytes(x)], x.dtype)


def _bytes(x: Array) -> list[Array]:
    """Return the bytes of each number less 128, int8, the lowest first."""
    size = x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)
    return [(((bits >> 8 * n) & 255).astype(jnp.int32) - 128).astype(jnp.int8) for n in range(size)]


def _dot(part: Array, places: np.ndarray) -> Array:
    rows, columns = part.shape
    groups = columns // len(places)
    grouped = part.reshape(rows, groups, len(places))
    contract = (((2,), (0,)), ((), ()))
    moved = lax.dot_general(
        grouped, jnp.asarray(places, jnp.int8), contract, preferred_element_type=jnp.int32
    )
    return moved.reshape(rows, groups * places.shape[1])


def _join(parts: list[Array], dtype: np.dtype) -> Array:
    """Invert `_bytes`, for int32 parts."""
    shifted = ((part + 128) << 8 * n for n, part in enumerate(parts))
    bits = functools.reduce(jnp.bitwise_or, shifted).astype(f"uint{8 * dtype.itemsize}")
    return lax.bitcast_convert_type(bits, dtype)
