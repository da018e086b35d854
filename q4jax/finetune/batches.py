"""The rows of each step, by `grain`."""

from typing import Any

import numpy as np

from q4jax.finetune.packing import Rows
from q4jax.finetune.requirements import require


class Batches:
    """Batches of rows, shuffled anew in each epoch.

    `grain` finds the batch of any step by its number and the seed alone. So there is no state to
    save: a run that resumes takes the batches that it would have had.

    Args:
      rows: packed documents.
      batch: rows of a step; fewer rows than these are repeated within a step.
      accumulate: parts of a step.
      seed: of the order.

    Raises:
      SettingsError: grain is not installed.
    """

    def __init__(self, rows: Rows, batch: int, accumulate: int, seed: int):
        grain: Any = require("grain", "finetune", "batches need a loader")
        order = grain.MapDataset.source(np.arange(len(rows))).seed(seed).shuffle().repeat()
        self._order = order.batch(batch)
        self._rows, self._accumulate = rows, accumulate

    def step(self, number: int) -> dict[str, np.ndarray]:
        """Return the arrays of a step, from 1 on, as `[parts, rows, length]`."""
        chosen = np.asarray(self._order[number - 1])
        arrays = self._rows.take(chosen)
        return {n: a.reshape(self._accumulate, -1, a.shape[-1]) for n, a in arrays.items()}
