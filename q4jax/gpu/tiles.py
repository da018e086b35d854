"""Sizes of tiles, from a table."""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterator
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


_tried: contextvars.ContextVar[Tile | None] = contextvars.ContextVar("tile", default=None)


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(importlib.resources.files("q4jax").joinpath("gpu", "tiles.json").read_text())


@contextlib.contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Within it, and within this thread, every product that is traced takes this tile.

    Only its `splits` are chosen as ever. This is for measuring: what `jit` has traced before keeps
    the tile it was traced with.
    """
    token = _tried.set(tile)
    try:
        yield
    finally:
        _tried.reset(token)


def verified() -> tuple[str, ...]:
    """Kinds of GPUs on which the kernels have been seen to be right; docs/gpu.md has the ledger."""
    return tuple(_table()["verified"])


def crossover(operation: str, dtype: Any) -> int:
    """The largest M at which the kernel is faster than dequantizing and a dense product."""
    return _table()["crossover"][operation][_dtype_class(dtype)]


def _dtype_class(dtype: Any) -> str:
    return "float32" if np.dtype(dtype).itemsize == 4 else "16 bits"


def choose(operation: str, m: int, shape: tuple[int, ...], dtype: Any) -> Tile:
    """The tile for a product of M rows with a weight [N, K].

    Args:
      operation: "linear" or "transposed".
      m: rows of the activation.
      shape: of the weight.
      dtype: the compute dtype.
    """
    rows = _table()[operation][_dtype_class(dtype)]
    _, *sizes = next((row for row in rows if m <= row[0]), rows[-1])
    tile = _tried.get() or Tile(*sizes)
    n, k = shape
    if operation == "linear":
        programs, steps = -(-m // tile.m) * -(-n // tile.n), -(-k // tile.k)
    else:
        programs, steps = -(-m // tile.m) * -(-k // tile.k), -(-n // tile.n)
    splits = max(1, min(_table()["programs"] // programs, steps // _table()["steps"]))
    # As many as have something to do.
    return dataclasses.replace(tile, splits=-(-steps // -(-steps // splits)))
