"""`--mesh` of `finetune.py`: a mesh from a text, a Llama and its batches on it."""

import math
import re
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.models import LlamaShardings

M = TypeVar("M")
_TEXT = re.compile(r"[a-z]+=[1-9][0-9]*(,[a-z]+=[1-9][0-9]*)*")


def sizes(text: str) -> dict[str, int]:
    """`"fsdp=4,tensor=2"` as a dict; ValueError for another form."""
    if not _TEXT.fullmatch(text):
        raise ValueError(f"--mesh must be like fsdp=4,tensor=2, got {text!r}")
    pairs = [part.split("=") for part in text.split(",")]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"--mesh names an axis twice: {text!r}")
    return {name: int(size) for name, size in pairs}


def simulate(text: str | None) -> None:
    """Has a CPU stand for as many devices; before JAX looks for any. Does nothing to others."""
    if text is not None:
        jax.config.update("jax_num_cpu_devices", math.prod(sizes(text).values()))


class Placement:
    """Where a run's model and batches go: on a mesh, or on the default device.

    Args:
      text: what follows `--mesh`, or None.
      blocksize: of the 4-bit weights.
    """

    def __init__(self, text: str | None, blocksize: int):
        self.rules = None
        if text is None:
            return
        axes = sizes(text)
        found, wanted = len(jax.devices()), math.prod(axes.values())
        if found != wanted:
            raise SystemExit(f"--mesh {text} is for {wanted} devices, there are {found}")
        devices = np.array(jax.devices()).reshape(tuple(axes.values()))
        mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
        self.rules = LlamaShardings(mesh, blocksize=blocksize)

    def place(self, tree: M, wrt: nnx.filterlib.Filter = ...) -> M:
        """A model or its optimizer, arrays or abstract, where it belongs."""
        return tree if self.rules is None else self.rules.place(tree, wrt)

    def rows(self) -> int:
        """Into how many parts a batch is split."""
        shape = {} if self.rules is None else self.rules.mesh.shape
        return shape.get("data", 1) * shape.get("fsdp", 1)

    def batch(self, tokens: np.ndarray) -> jax.Array:
        """int32 `[B, T]`, the same in every process; split where B allows it."""
        if self.rules is None:
            return jax.numpy.asarray(tokens)
        whole = NamedSharding(self.rules.mesh, PartitionSpec())
        sharding = whole if len(tokens) % self.rows() else self.rules.batch
        return jax.make_array_from_callback(tokens.shape, sharding, lambda part: tokens[part])
