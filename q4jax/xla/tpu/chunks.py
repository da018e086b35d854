"""Loops over parts of a matrix, so that what is computed on the way is small."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

Carry = TypeVar("Carry")
ROWS = 32  # of bytes that lie in one register of a TPU


def over(
    part: Callable[[Carry, int | Array, int], Carry],
    carry: Carry,
    count: int,
    *,
    most: int,
    unit: int,
) -> Carry:
    """Run `carry = part(carry, first, size)` over runs of the numbers below `count`.

    Args:
      part: takes the carry, the first number of a run and how many it has.
      carry: the first carry.
      count: how many numbers there are.
      most: the most numbers of a run, if they are `unit` or more.
      unit: what a run is a multiple of, but for the last one.
    """
    most = max(most // unit, 1) * unit
    if count <= most:
        return part(carry, 0, count)
    # Of equal runs, where `count` allows: another last one would be compiled apart.
    size = -(-count // -(-count // most) // unit) * unit
    carry = lax.fori_loop(0, count // size, lambda i, carry: part(carry, i * size, size), carry)
    rest = count % size
    return part(carry, count - rest, rest) if rest else carry


def over_rows(
    part: Callable[..., Carry], carry: Carry, *arrays: Array, columns: int, elements: int
) -> Carry:
    """Run `carry = part(carry, first, *parts)` over chunks of the rows of some arrays.

    Args:
      part: takes the carry, the number of the chunk's first row and the chunk of each array.
      carry: the first carry.
      *arrays: arrays with as many rows.
      columns: the columns of a row.
      elements: the most elements of a chunk, if they are 32 rows or more.
    """

    def chunk(carry: Carry, first: int | Array, size: int) -> Carry:
        return part(carry, first, *(cut(a, (first, 0), (size, a.shape[1])) for a in arrays))

    return over(chunk, carry, len(arrays[0]), most=elements // columns, unit=ROWS)


def cut(array: Array, first: tuple[int | Array, ...], shape: tuple[int, ...]) -> Array:
    """Return the part of this shape from `first` on; the array itself where that is all of it."""
    if array.shape == shape:
        return array
    return lax.dynamic_slice(array, [jnp.asarray(n, jnp.int32) for n in first], shape)
