"""Batches of prompts, padded to one of a few widths so that few programs are compiled."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from q4jax.models.decoder.sequences import check_mask, check_token_ids

_SMALLEST = 16


def bucket(count: int) -> int:
    """Round a length up to the next of 16, 24, 32, 48, 64, 96 and so on.

    >>> [bucket(count) for count in (1, 17, 33, 1000)]
    [16, 24, 48, 1024]
    """
    width = _SMALLEST
    while width < count:
        width *= 2
    smaller = width * 3 // 4
    return smaller if smaller > _SMALLEST and count <= smaller else width


class Prompts(NamedTuple):
    """A batch of prompts, padded on the left.

    Attributes:
      shown: int32 `[B, P]`, the prompts as `generate` returns them.
      ids: int32 `[B, bucket]`, padded with 0.
      mask: bool `[B, bucket]`, False at padding.
      longest: length of the longest prompt.
    """

    shown: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    longest: int

    @classmethod
    def from_ids(cls, input_ids: Any, attention_mask: Any, pad: int, vocab_size: int) -> "Prompts":
        """Build a batch from an array `[B, P]` and its mask, or from a list of token lists.

        Raises:
          ValueError: there is no prompt, or an empty one; tokens are not integers or not in the
            vocabulary; the mask has another shape.
        """
        ragged = isinstance(input_ids, Sequence)
        if ragged:
            if attention_mask is not None:
                raise ValueError("attention_mask must be None for a list of prompts")
            rows = [np.asarray(prompt) for prompt in input_ids]
            if not rows or any(row.ndim != 1 for row in rows):
                raise ValueError(f"input_ids must be a list of lists of tokens, got {input_ids!r}")
        else:
            array = np.asarray(input_ids)
            if array.ndim != 2:
                raise ValueError(f"input_ids must be [batch, tokens], got {array.shape}")
            mask = np.asarray(
                np.ones(array.shape, bool) if attention_mask is None else attention_mask
            )
            if mask.shape != array.shape:
                raise ValueError(
                    f"attention_mask must be {array.shape} as input_ids, got {mask.shape}"
                )
            check_mask(mask)
            rows = [row[real.astype(bool)] for row, real in zip(array, mask, strict=True)]
            if not rows:
                raise ValueError(f"input_ids must hold a prompt, got {array.shape}")
        for number, row in enumerate(rows):
            if not row.size:
                raise ValueError(f"prompt {number} of input_ids has no tokens")
            if not np.issubdtype(row.dtype, np.integer):
                raise ValueError(f"input_ids must be integers, got {row.dtype}")
            check_token_ids(f"tokens of prompt {number}", row, vocab_size)
        longest = max(row.size for row in rows)
        shown = _aligned(rows, longest, pad) if ragged else array.astype(np.int32)
        ids = _aligned(rows, bucket(longest), 0)
        mask = _aligned([np.ones(row.size) for row in rows], bucket(longest), 0).astype(bool)
        return cls(shown, ids, mask, longest)


def _aligned(rows: list[np.ndarray], width: int, fill: int) -> np.ndarray:
    """Return rows as int32 `[B, width]`, padded on the left with `fill`."""
    out = np.full((len(rows), width), fill, np.int32)
    for target, row in zip(out, rows, strict=True):
        target[width - row.size :] = row
    return out
