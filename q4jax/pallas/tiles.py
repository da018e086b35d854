"""Sizes of tiles, from a table."""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program works on, and with what.

    Attributes:
      m, n, k: rows of x, rows of the weight, columns of the weight; powers of two.
      warps: of a program.
      stages: of the software pipeline.
      splits: programs that share the sum over one tile of the result.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(importlib.resources.files("q4jax.pallas").joinpath("tiles.json").read_text())


def choose(operation: str, m: int, shape: tuple[int, ...], dtype: Any) -> Tile:
    """The tile for a product of M rows with a weight [N, K].

    Args:
      operation: "linear" or "transposed".
      m: rows of the activation.
      shape: of the weight.
      dtype: the compute dtype.
    """
    name = "float32" if np.dtype(dtype).itemsize == 4 else "16 bits"
    rows = _table()[operation][name]
    _, *sizes = next((row for row in rows if m <= row[0]), rows[-1])
    tile = Tile(*sizes)
    n, k = shape
    if operation == "linear":
        programs, steps = -(-m // tile.m) * -(-n // tile.n), -(-k // tile.k)
    else:
        programs, steps = -(-m // tile.m) * -(-k // tile.k), -(-n // tile.n)
    splits = max(1, min(_table()["programs"] // programs, steps // _table()["steps"]))
    # As many as have something to do.
    return dataclasses.replace(tile, splits=-(-steps // -(-steps // splits)))
