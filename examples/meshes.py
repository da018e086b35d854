"""The `--mesh` option of `finetune.py`: parse it, and shard a Llama and its batches."""

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
    """Parse `"fsdp=4,tensor=2"` into a dict; ValueError if it is malformed."""
    if not _TEXT.fullmatch(text):
        raise ValueError(f"--mesh must be like fsdp=4,tensor=2, got {text!r}")
    pairs = [part.split("=") for part in text.split(",")]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"--mesh names an axis twice: {text!r}")
    return {name: int(size) for name, size in pairs}


def simulate(text: str | None) -> None:
    """Make a CPU simulate the mesh's devices; call it before JAX initializes its devices."""
    if text is not None:
        jax.config.update("jax_num_cpu_devices", math.prod(sizes(text).values()))


class RunSharding:
    """Shards a run's model and batches on a mesh, or keeps them on the default device.

    Args:
      text: value of `--mesh`, or None.
      blocksize: block size of the 4-bit weights.
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

    def shard(self, tree: M, wrt: nnx.filterlib.Filter = ...) -> M:
        """Shard a model or its optimizer, concrete or abstract."""
        return tree if self.rules is None else self.rules.place(tree, wrt)

    def batch_parts(self) -> int:
        """Return the number of parts that a batch is split into."""
        shape = {} if self.rules is None else self.rules.mesh.shape
        return shape.get("data", 1) * shape.get("fsdp", 1)

    def batch(self, tokens: np.ndarray) -> jax.Array:
        """Shard int32 `[B, T]`, equal in all processes; replicate it if B is not divisible."""
        if self.rules is None:
            return jax.numpy.asarray(tokens)
        replicated = NamedSharding(self.rules.mesh, PartitionSpec())
        sharding = replicated if len(tokens) % self.batch_parts() else self.rules.batch
        return jax.make_array_from_callback(tokens.shape, sharding, lambda part: tokens[part])
