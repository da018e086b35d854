"""What the compiler's partitioner and an op tell each other: a sharding rule, and shardings."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule
from jax.sharding import Mesh

from q4jax.sharding.axes import AxisLabel, AxisLabels, MeshAxes, ShardedOperand, max_parts


def sharding_rule(
    operands: Sequence[ShardedOperand], results: Sequence[AxisLabels], contraction: str | None
) -> SdyShardingRule:
    """The Shardy rule of an op.

    Shardings propagate through equal labels, never into a unit or an axis without a label.
    """
    parts = max_parts(operands)
    sizes: dict[str, int] = {}
    replicated: list[str] = []  # factors that are never sharded, in their order of appearance

    def factor(axis: AxisLabel) -> Any:
        if axis.unit == 1 and axis.label is not None:
            return axis.label
        name = f"whole{len(replicated)}"
        replicated.append(name)
        if axis.label is None or parts[axis.label] == 1:
            return name
        sizes[name] = axis.unit
        return CompoundFactor(axis.label, name)

    def mappings(arrays: Iterable[AxisLabels]) -> tuple[ArrayMapping, ...]:
        return tuple(ArrayMapping(*map(factor, labels)) for labels in arrays)

    labels = {axis.label for operand in operands for axis in operand.labels}
    return SdyShardingRule(
        mappings(operand.labels for operand in operands),
        mappings(results),
        reduction_factors=(contraction,) if contraction and contraction in labels else (),
        need_replication_factors=tuple(replicated),
        **sizes,  # type: ignore[arg-type]
    )


def mesh_from_context(array: Any, context: tuple[tuple[str, int], ...]) -> Mesh:
    """The mesh of `jax.set_mesh` on the devices of a program that does not name its mesh.

    Args:
      array: an operand as the partitioner describes it.
      context: names and sizes of the axes of the mesh that was set while tracing.

    Raises:
      NotImplementedError: no mesh was set, or one of another number of devices.
    """
    devices = list(array.sharding.devices_indices_map(array.shape))
    names, sizes = zip(*context, strict=True) if context else ((), ())
    if math.prod(sizes) != len(devices):
        raise NotImplementedError(
            f"4-bit weights on {len(devices)} devices need shardings of a jax.sharding.Mesh, or "
            "one set by jax.set_mesh"
        )
    return Mesh(np.array(devices).reshape(sizes), names)


def mesh_axes_of_sharding(array: Any, mesh: Mesh) -> tuple[MeshAxes, ...]:
    """The mesh axes that shard each axis, found from where each device's part starts.

    An axis that the compiler split by a part of a mesh axis counts as unsharded.
    """
    shape = array.shape
    parts = array.sharding.devices_indices_map(shape)
    starts = np.array(
        [
            [part.indices(size)[0] for part, size in zip(parts[device], shape, strict=True)]
            for device in mesh.devices.flat
        ],
        np.int64,
    ).reshape(*mesh.devices.shape, len(shape))
    return tuple(_mesh_axes_of(starts[..., axis], mesh) for axis in range(len(shape)))


def _mesh_axes_of(starts: np.ndarray, mesh: Mesh) -> MeshAxes:
    steps = {
        name: int(np.diff(starts, axis=number).max(initial=0))
        for number, name in enumerate(mesh.axis_names)
    }
    axes = tuple(sorted((name for name in steps if steps[name]), key=lambda name: -steps[name]))
    complete = math.prod(mesh.shape[name] for name in axes) == len(np.unique(starts))
    return axes if complete else ()
