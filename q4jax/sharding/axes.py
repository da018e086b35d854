"""Axis labels: what the axes of an op's arrays mean, and which mesh axes shard them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class AxisLabel(NamedTuple):
    """The meaning of one axis of an array.

    Attributes:
      label: axes with the same label are sharded alike; an axis with None is never sharded.
      unit: the number of neighbouring elements that stay on one device.
    """

    label: str | None
    unit: int = 1


AxisLabels = tuple[AxisLabel, ...]
MeshAxes = tuple[str, ...]
Split = Mapping[str, MeshAxes]
"""Label -> the mesh axes that shard the axes with this label."""

REPLICATED = AxisLabel(None)


def batch_labels(shape: tuple[int, ...]) -> AxisLabels:
    """Labels of batch axes with these sizes."""
    return tuple(AxisLabel(f"batch{i}") for i in range(len(shape)))


class ShardedOperand(NamedTuple):
    """An operand or result of an op and how it is sharded.

    Attributes:
      labels: the meaning of each axis.
      shape: the global shape.
      mesh_axes: the mesh axes that shard each axis; None where this is not known.
      itemsize: bytes of an element.
    """

    labels: AxisLabels
    shape: tuple[int, ...]
    mesh_axes: tuple[MeshAxes, ...] | None
    itemsize: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the global array."""
        return math.prod(self.shape) * self.itemsize

    def sharded_axes(self) -> dict[str, MeshAxes]:
        """Label -> the mesh axes that shard it in this array."""
        found = zip(self.labels, self.mesh_axes or (), strict=False)
        return {axis.label: axes for axis, axes in found if axis.label is not None and axes}


def max_parts(arrays: Iterable[ShardedOperand]) -> dict[str, int]:
    """Label -> the largest number of parts that it can be split into."""
    found: dict[str, int] = {}
    for array in arrays:
        for axis, size in zip(array.labels, array.shape, strict=True):
            if axis.label is not None:
                found[axis.label] = size // axis.unit
    return found


def mesh_axes_of(spec: Any, ndim: int, sizes: Mapping[str, int]) -> tuple[MeshAxes, ...]:
    """The mesh axes in a PartitionSpec for each of `ndim` axes, without those of size 1."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    tuples = ((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in tuples)


def partition_spec(labels: AxisLabels, split: Split) -> PartitionSpec:
    """The PartitionSpec of an array with these labels."""
    return PartitionSpec(*(split.get(axis.label or "") or None for axis in labels))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where an op's operands lie on Auto mesh axes, as far as its caller knows.

    Attributes:
      weight: the mesh axes of each axis of the weight's codes; the last ones, where the codes have
        fewer axes.
      batch: those of the first batch axis of the other operands.
    """

    weight: tuple[MeshAxes, ...]
    batch: MeshAxes

    def of_labels(self, packed: AxisLabels, contraction: str | None) -> tuple[Split, Split]:
        """Return the mesh axes of each label, in the weight and in other operands.

        Args:
          packed: the labels of the weight's codes.
          contraction: the label that the op sums over. Another operand has it sharded as the weight
            has, but for the axes of the batch.
        """
        own = (*((),) * len(packed), *self.weight)[-len(packed) :]
        weight = {a.label: axes for a, axes in zip(packed, own, strict=True) if a.label and axes}
        lead = {n: axes for n, axes in weight.items() if n.startswith(("vmap", "lead"))}
        summed = tuple(a for a in weight.get(contraction or "", ()) if a not in self.batch)
        others = {**lead, "batch0": self.batch, contraction or "": summed}
        return weight, others


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ExplicitSharding:
    """The sharding of an array on Explicit mesh axes, or None on other meshes."""

    sharding: NamedSharding | None

    @classmethod
    def from_array(cls, array: Array) -> "ExplicitSharding":
        """Read the sharding from the type of `array`, which may be traced."""
        sharding = jax.typeof(array).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return cls(sharding if explicit else None)

    def apply(self, array: Array) -> Array:
        """Reshard `array`, which has the same shape, to it."""
        return array if self.sharding is None else jax.sharding.reshard(array, self.sharding)
