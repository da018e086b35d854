"""Packing: documents of any length in rows of one length, with as little padding as there can be.

A row holds pairs of a token and the one that follows it in its document. A document that is longer
than a row is cut; its parts share one token, so that no pair is lost. Parts go to the row that they
fill best, the longest first.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from q4jax.finetune.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Rows:
    """N packed rows of L pairs.

    Attributes:
      inputs: int32 `[N, L]`, tokens; 0 at padding.
      targets: int32 `[N, L]`, the token after each.
      weights: float32 `[N, L]`, 1 where the loss counts the target, else 0.
      segments: int32 `[N, L]`, the document of each token, from 1 on; 0 at padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def alone(self) -> bool:
        """Whether no row holds two documents: then padding is last, and causal attention is all."""
        return bool(self.segments.max(initial=0) <= 1)

    @property
    def learned(self) -> int:
        """The number of targets that the loss counts."""
        return int(self.weights.sum())

    @property
    def padding(self) -> float:
        """The share of padding."""
        return float(np.mean(self.segments == 0)) if len(self) else 0.0

    def take(self, rows: Any) -> dict[str, np.ndarray]:
        """Return the arrays of some rows, as `loss` takes them; `segments` where they matter."""
        names = ("inputs", "targets", "weights", *(() if self.alone else ("segments",)))
        return {name: getattr(self, name)[rows] for name in names}


def pack(documents: Sequence[Tokens], length: int) -> Rows:
    """Pack documents into rows of `length` pairs.

    Parts that have no target to learn are left out.

    Examples:
      >>> ids = [np.arange(3), np.arange(10, 16), np.arange(20, 22)]
      >>> rows = pack([Tokens(i, np.ones(i.size, bool)) for i in ids], 4)
      >>> rows.inputs
      array([[10, 11, 12, 13],
             [ 0,  1, 14, 20]], dtype=int32)
      >>> rows.targets[1], rows.segments[1]
      (array([ 1,  2, 15, 21], dtype=int32), array([1, 1, 2, 3], dtype=int32))
    """
    parts = [part for document in documents for part in _cut(document, length)]
    parts = [part for part in parts if part.learned[1:].any()]
    parts.sort(key=lambda part: -part.ids.size)
    places = _fit([part.ids.size - 1 for part in parts], length)
    count = max((row for row, _, _ in places), default=-1) + 1
    inputs, targets, segments = (np.zeros((count, length), np.int32) for _ in range(3))
    weights = np.zeros((count, length), np.float32)
    for part, (row, start, number) in zip(parts, places, strict=True):
        at = (row, slice(start, start + part.ids.size - 1))
        inputs[at], targets[at] = part.ids[:-1], part.ids[1:]
        weights[at], segments[at] = part.learned[1:], number
    return Rows(inputs, targets, weights, segments)


def _cut(document: Tokens, length: int) -> list[Tokens]:
    starts = range(0, document.ids.size - 1, length)
    return [Tokens(*(array[at : at + length + 1] for array in document)) for at in starts]


def _fit(sizes: list[int], length: int) -> list[tuple[int, int, int]]:
    """Return (row, start in it, number in it from 1 on) of parts: the fullest row that takes it."""
    places: list[tuple[int, int, int]] = []
    filled: list[tuple[int, int]] = []  # of each row: pairs and parts
    spaces: list[tuple[int, int]] = []  # sorted (free pairs, row)
    for size in sizes:
        found = bisect.bisect_left(spaces, (size, -1))
        if found < len(spaces):
            _, row = spaces.pop(found)
        else:
            row = len(filled)
            filled.append((0, 0))
        start, number = filled[row][0], filled[row][1] + 1
        filled[row] = (start + size, number)
        places.append((row, start, number))
        if start + size < length:
            bisect.insort(spaces, (length - start - size, row))
    return places
