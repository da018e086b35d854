"""The loop over the rows of a matrix, so that what is computed on the way is small."""

from collections.abc import Callable
from typing import TypeVar

from jax import Array, lax

Carry = TypeVar("Carry")
_UNIT = 32  # rows of bytes that lie in one register of a TPU


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
    count = arrays[0].shape[0]
    most = max(elements // columns // _UNIT, 1) * _UNIT
    if count <= most:
        return part(carry, 0, *arrays)
    # Of equal chunks, where rows allow: another last one would be compiled apart.
    size = -(-count // -(-count // most) // _UNIT) * _UNIT

    def step(number: int | Array, carry: Carry, rows: int = size) -> Carry:
        first = number * size
        return part(carry, first, *(lax.dynamic_slice_in_dim(a, first, rows) for a in arrays))

    carry = lax.fori_loop(0, count // size, step, carry)
    return step(count // size, carry, count % size) if count % size else carry
