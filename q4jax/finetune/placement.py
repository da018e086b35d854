"""Where the arrays of a run lie: on a mesh, or on the default device."""

import contextlib
import math
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.finetune.mesh_text import sizes
from q4jax.finetune.settings import SettingsError
from q4jax.models.decoder.shardings import LlamaShardings

M = TypeVar("M")


def simulate(text: str | None) -> None:
    """Let a CPU simulate the devices of a mesh; call it before JAX initializes its devices."""
    if text is not None:
        jax.config.update("jax_num_cpu_devices", math.prod(sizes(text).values()))


def _axis_type(devices: np.ndarray) -> AxisType:
    """The type of a mesh's axes: on Auto ones, XLA for TPU compiles no operation of 4 bits."""
    return AxisType.Explicit if devices.flat[0].platform == "tpu" else AxisType.Auto


class Placement:
    """Shards a run's model and batches on a mesh, or keeps them on the default device.

    Args:
      text: the setting `mesh`, or None.
      blocksize: block size of the 4-bit weights.

    Raises:
      SettingsError: the mesh is for another number of devices than there are.
    """

    def __init__(self, text: str | None, blocksize: int = 64):
        self.rules: LlamaShardings | None = None
        if text is None:
            return
        axes = sizes(text)
        found, wanted = len(jax.devices()), math.prod(axes.values())
        if found != wanted:
            raise SettingsError(f"--mesh {text} is for {wanted} devices, there are {found}")
        devices = np.array(jax.devices()).reshape(tuple(axes.values()))
        mesh = Mesh(devices, tuple(axes), axis_types=(_axis_type(devices),) * len(axes))
        self.rules = LlamaShardings(mesh, blocksize=blocksize)

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the arrays of a run are made and used."""
        if self.rules is None or AxisType.Auto in self.rules.mesh.axis_types:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = jax.set_mesh(self.rules.mesh)
        return context

    # Equal placements are one for `jit`, so that a second run compiles nothing anew.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(self.rules)

    def place(self, tree: M, wrt: nnx.filterlib.Filter = ...) -> M:
        """Shard a model or its optimizer, concrete or abstract; it is changed and returned."""
        return tree if self.rules is None else self.rules.place(tree, wrt)

    @property
    def batch_parts(self) -> int:
        """The number of parts that the rows of a batch are split into."""
        shape: dict[str, int] = {} if self.rules is None else dict(self.rules.mesh.shape)
        return shape.get("data", 1) * shape.get("fsdp", 1)

    def batch(self, arrays: dict[str, np.ndarray], rows: int = 0) -> dict[str, Any]:
        """Place arrays that are equal in all processes, split along their axis of rows."""
        return {name: self._array(array, rows) for name, array in arrays.items()}

    def _array(self, array: np.ndarray, rows: int) -> jax.Array:
        if self.rules is None:
            return jax.numpy.asarray(array)
        spec = PartitionSpec(*(None,) * rows, *self.rules.batch.spec)
        if array.shape[rows] % self.batch_parts:
            spec = PartitionSpec()
        sharding = NamedSharding(self.rules.mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
