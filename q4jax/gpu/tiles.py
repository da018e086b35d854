"""Tile sizes of the GPU kernels, from a table."""

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
    """The sizes of one program's work. All but `stages` and `splits` are powers of two.

    Attributes:
      m: rows of x.
      n: rows of the weight.
      k: columns of the weight.
      warps: warps of a program.
      stages: stages of the software pipeline.
      splits: programs that share the sum over one tile of the result.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int = 1


_tried: contextvars.ContextVar[Tile | None] = contextvars.ContextVar("tile", default=None)


_others: list[dict[str, Any]] = []  # the last one counts; empty: the package's


def _table() -> dict[str, Any]:
    return _others[-1] if _others else _shipped()


@functools.cache
def _shipped() -> dict[str, Any]:
    return json.loads(importlib.resources.files("q4jax").joinpath("gpu", "tiles.json").read_text())


def use_table(table: dict[str, Any] | None) -> None:
    """Have products that are traced from now on take another table; None: the package's again."""
    _others[:] = [] if table is None else [table]


@contextlib.contextmanager
def override(tile: Tile) -> Iterator[None]:
    """Have every product that this thread traces inside take a tile; for tuning.

    Its `splits` are still chosen for the shape. Programs that `jit` traced before keep their tile.
    """
    token = _tried.set(tile)
    try:
        yield
    finally:
        _tried.reset(token)


def verified() -> tuple[str, ...]:
    """The device kinds on which the kernels were verified; docs/gpu.md has the ledger."""
    return tuple(_table()["verified"])


def crossover(op: str, dtype: Any) -> int:
    """The largest M at which the kernel is faster than dequantizing and a dense product."""
    return _table()["crossover"][op][_dtype_class(dtype)]


def _dtype_class(dtype: Any) -> str:
    return "float32" if np.dtype(dtype).itemsize == 4 else "16 bits"


def choose(m: int, shape: tuple[int, ...], dtype: Any, *, transpose: bool) -> Tile:
    """Choose the tile for a product of M rows with a weight [N, K].

    Args:
      m: rows of the activation.
      shape: shape of the weight.
      dtype: the compute dtype.
      transpose: whether the product is `g @ W` instead of `x @ W.T`.
    """
    rows = _table()["linear_transpose" if transpose else "linear"][_dtype_class(dtype)]
    _, *sizes = next((row for row in rows if m <= row[0]), rows[-1])
    tile = _tried.get() or Tile(*sizes)
    n, k = shape
    across, steps = -(-n // tile.n), -(-k // tile.k)
    if transpose:
        across, steps = steps, across
    programs = -(-m // tile.m) * across
    splits = max(1, min(_table()["programs"] // programs, steps // _table()["steps"]))
    # As many as have something to do.
    return dataclasses.replace(tile, splits=-(-steps // -(-steps // splits)))
