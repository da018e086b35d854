"""How an operation runs on a mesh: the caller's mesh decides.

- No mesh, or axes of the type Auto: `custom_partitioning`. The compiler propagates shardings
  through the operation by its rule, asks for the plan, and gathers what the plan says.
- Explicit axes: `shard_map` by the same plan, from the shardings in the types.
- All axes manual, inside the caller's `shard_map`: the operands are shards; nothing is moved.

On one device all of this leaves nothing behind.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.ops.weight_sharding import Axes, Dim, Dims, Operation, Split, WholeFeatures
from q4jax.sharding import strategy as splitting
from q4jax.sharding.strategy import Placed

_WEIGHT = {"linear": 1, "transposed": 1, "rows": 1, "dequantize": 0}
"""Operation -> the number of the operand that is a weight's arrays."""
_ROWS = ("linear", "transposed", "rows", "features")
"""Operations whose first operand may have any number of axes in front."""


def run(operation: Operation | WholeFeatures, *operands: Any) -> tuple[Array, ...]:
    """The operation's results; operands are as `Operation` describes them.

    Raises:
      ValueError: with explicit axes, as `splitting.check_weight`. With Auto axes this is found when
        the program is compiled, and is a `jax.errors.JaxRuntimeError` with the same text.
      NotImplementedError: a mesh with axes of several types.
    """
    flat, tree = jax.tree.flatten(operands)
    return tuple(_batched(operation, tree, 0)(*flat))


@dataclasses.dataclass(frozen=True)
class _Call:
    """An operation on flat operands, which have `lead` axes more, as `vmap` adds them."""

    operation: Operation | WholeFeatures
    tree: Any
    lead: int

    def places(self, arrays: Sequence[Any], axes: Sequence[Any]) -> tuple[list[Placed], list[Dims]]:
        """The operands, given how they lie; what the axes of the results mean."""
        lead = tuple(Dim(f"vmap{i}") for i in range(self.lead))
        bare = [jax.ShapeDtypeStruct(a.shape[self.lead :], a.dtype) for a in arrays]
        operands, results = self.operation.dims(*jax.tree.unflatten(self.tree, bare))
        flat = jax.tree.leaves(operands, is_leaf=_is_dims)
        placed = [
            Placed((*lead, *dims), tuple(array.shape), split, array.dtype.itemsize)
            for dims, array, split in zip(flat, arrays, axes, strict=True)
        ]
        return placed, [(*lead, *dims) for dims in results]

    def decide(
        self, placed: list[Placed], results: list[Placed], sizes: Mapping[str, int]
    ) -> Split:
        """The plan; raises as `splitting.check_weight`."""
        number = _WEIGHT.get(self.operation.name)
        numbers = jax.tree.unflatten(self.tree, range(len(placed)))
        mine = [] if number is None else jax.tree.leaves(numbers[number])[:2]
        weight = [placed[i] for i in mine]
        if isinstance(self.operation, Operation):
            splitting.check_weight(self.operation.spec.tag(), weight, sizes)
        others = [p for i, p in enumerate(placed) if i not in mine]
        return splitting.decide(others, results, weight, self.operation.contraction, sizes)

    def specs(
        self, split: Split, operands: Sequence[Dims], results: Sequence[Dims]
    ) -> tuple[tuple[PartitionSpec, ...], tuple[PartitionSpec, ...]]:
        """How the operands have to lie, and how the results do."""
        moved = split
        if self.operation.gathers:
            moved = {label: axes for label, axes in split.items() if label.startswith("vmap")}
        into = tuple(splitting.partition_spec(dims, moved) for dims in operands)
        return into, tuple(splitting.partition_spec(dims, split) for dims in results)

    def on_shard(self, split: Split, sizes: Mapping[str, int]) -> Callable[..., Any]:
        """The function of the operands' shards."""
        function = self.operation.on_shard(split, sizes)
        for _ in range(self.lead):
            function = jax.vmap(function)

        # A program of its own: it may have constants, which neither wrapper takes.
        @jax.jit
        def on_shard(*flat: Array) -> tuple[Array, ...]:
            return function(*jax.tree.unflatten(self.tree, flat))

        return on_shard


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lies:
    """How an array lies on a mesh with explicit axes; nothing on others."""

    sharding: NamedSharding | None

    @classmethod
    def of(cls, array: Array) -> "Lies":
        """How `array`, which may be traced, lies."""
        sharding = jax.typeof(array).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return cls(sharding if explicit else None)

    def place(self, array: Array) -> Array:
        """`array`, of the same shape, lying so."""
        return array if self.sharding is None else jax.sharding.reshard(array, self.sharding)


def _is_dims(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(dim, Dim) for dim in node)


@functools.cache
def _batched(
    operation: Operation | WholeFeatures, tree: Any, lead: int
) -> Callable[..., tuple[Array, ...]]:
    """The operation under `vmap`, which adds an axis in front to every operand."""
    call = _Call(operation, tree, lead)

    @custom_vmap
    def run(*flat: Array) -> tuple[Array, ...]:
        return _on_mesh(call, flat)

    @run.def_vmap
    def _(size: int, batched: list[bool], *flat: Array) -> tuple[Any, Any]:
        if operation.name in _ROWS and batched[0] and not any(batched[1:]):
            # More rows for the same weight, which is not to be copied for each of them.
            rows = jnp.moveaxis(flat[0], 0, lead)
            results = _batched(operation, tree, lead)(rows, *flat[1:])
            return tuple(jnp.moveaxis(r, lead, 0) for r in results), (True,) * len(results)
        full = [
            a if b else jnp.broadcast_to(a, (size, *a.shape))
            for a, b in zip(flat, batched, strict=True)
        ]
        results = _batched(operation, tree, lead + 1)(*full)
        return results, (True,) * len(results)

    return run


def axes_by_type() -> dict[AxisType, tuple[str, ...]]:
    """The axes of the mesh that surrounds this, but for those that split nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    axes: dict[AxisType, tuple[str, ...]] = {}
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if mesh.shape[name] > 1:
            axes[kind] = (*axes.get(kind, ()), name)
    return axes


def _on_mesh(call: _Call, flat: Sequence[Array]) -> tuple[Array, ...]:
    mesh, axes = jax.sharding.get_abstract_mesh(), axes_by_type()
    auto, explicit = axes.get(AxisType.Auto, ()), axes.get(AxisType.Explicit, ())
    if auto and explicit:
        raise NotImplementedError(
            f"4-bit weights on a mesh whose axes are Auto {auto} and Explicit {explicit}: make "
            "them of one type"
        )
    if explicit:
        return _explicit(call, flat, mesh, explicit)
    if auto and AxisType.Manual in axes:
        return _partly_manual(call, flat, auto)
    if mesh.axis_names and not auto:
        return call.on_shard({}, {})(*flat)
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat)
    return _auto(call, shapes, tuple(mesh.shape.items()))(*flat)


def _partly_manual(call: _Call, flat: Sequence[Array], auto: tuple[str, ...]) -> tuple[Array, ...]:
    # There the compiler does not say how operands lie, so it must see what is computed.
    operation = call.operation
    assert isinstance(operation, Operation)  # `whole_features` does nothing there
    if operation.implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation={operation.implementation!r} inside a shard_map that leaves the mesh "
            f"axes {auto} to the compiler: make them manual too"
        )
    visible = dataclasses.replace(operation, implementation="xla")
    return dataclasses.replace(call, operation=visible).on_shard({}, {})(*flat)


def _explicit(
    call: _Call, flat: Sequence[Array], mesh: Any, explicit: tuple[str, ...]
) -> tuple[Array, ...]:
    sizes = dict(mesh.shape)
    axes = [splitting.spec_axes(jax.typeof(a).sharding.spec, a.ndim, sizes) for a in flat]
    placed, results = call.places(flat, axes)
    split = call.decide(placed, [], sizes)
    into, out = call.specs(split, [p.dims for p in placed], results)
    function = jax.shard_map(
        call.on_shard(split, sizes),
        axis_names=set(explicit),
        in_specs=into,
        out_specs=out,
        check_vma=False,
    )
    return function(*map(jax.sharding.reshard, flat, into))


@functools.lru_cache(1024)
def _auto(
    call: _Call, shapes: tuple[jax.ShapeDtypeStruct, ...], context: tuple[tuple[str, int], ...]
) -> Callable[..., Any]:
    """The operation for a compiler that partitions; `context` is the mesh of `jax.set_mesh`."""
    whole = call.on_shard({}, {})

    @custom_partitioning
    def run(*flat: Array) -> tuple[Array, ...]:
        return whole(*flat)

    def partition(mesh: Mesh, operands: Any, wanted: Any) -> Any:
        if mesh.empty:
            mesh = _mesh_of(operands[0], context)
        sizes = dict(mesh.shape)
        lies = [_axes(a, mesh) for a in operands]
        placed, dims = call.places(operands, lies)
        goals = [Placed(d, r.shape, _axes(r, mesh)) for d, r in zip(dims, wanted, strict=True)]
        split = call.decide(placed, goals, sizes)
        specs = call.specs(split, [p.dims for p in placed], dims)
        into, out = (tuple(NamedSharding(mesh, spec) for spec in part) for part in specs)
        return mesh, call.on_shard(split, sizes), out, into

    placed, dims = call.places(shapes, [None] * len(shapes))
    # Not decoded by JAX, which can only where the program names its mesh, and raises where a mesh
    # axis is split in parts.
    rule = _rule(placed, dims, call.operation.contraction)
    run.def_partition(partition, decode_shardings=False, sharding_rule=rule)
    return run


def _mesh_of(array: Any, context: tuple[tuple[str, int], ...]) -> Mesh:
    """The mesh of the context on the devices of a program that names no mesh itself."""
    devices = list(array.sharding.devices_indices_map(array.shape))
    names, sizes = zip(*context, strict=True) if context else ((), ())
    if math.prod(sizes) != len(devices):
        raise NotImplementedError(
            f"4-bit weights on {len(devices)} devices need shardings of a jax.sharding.Mesh, or "
            "one set by jax.set_mesh"
        )
    return Mesh(np.array(devices).reshape(sizes), names)


def _axes(array: Any, mesh: Mesh) -> tuple[Axes, ...]:
    """The mesh axes that split each axis of an array: by where the part of each device starts.

    An axis that the compiler split by a part of a mesh axis counts as whole.
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
    return tuple(_axes_of(starts[..., axis], mesh) for axis in range(len(shape)))


def _axes_of(starts: np.ndarray, mesh: Mesh) -> Axes:
    steps = {
        name: int(np.diff(starts, axis=number).max(initial=0))
        for number, name in enumerate(mesh.axis_names)
    }
    axes = tuple(sorted((name for name in steps if steps[name]), key=lambda name: -steps[name]))
    whole = math.prod(mesh.shape[name] for name in axes) == len(np.unique(starts))
    return axes if whole else ()


def _rule(
    operands: Sequence[Placed], results: Sequence[Dims], contraction: str | None
) -> SdyShardingRule:
    """How shardings propagate: through equal labels, never into a unit or an axis without label."""
    parts = splitting.units(operands)
    sizes: dict[str, int] = {}
    whole: list[str] = []  # factors that are not split, in the order in which they appear

    def factor(dim: Dim) -> Any:
        if dim.unit == 1 and dim.label is not None:
            return dim.label
        name = f"whole{len(whole)}"
        whole.append(name)
        if dim.label is None or parts[dim.label] == 1:
            return name
        sizes[name] = dim.unit
        return CompoundFactor(dim.label, name)

    def mappings(arrays: Iterable[Dims]) -> tuple[ArrayMapping, ...]:
        return tuple(ArrayMapping(*map(factor, dims)) for dims in arrays)

    labels = {dim.label for operand in operands for dim in operand.dims}
    return SdyShardingRule(
        mappings(operand.dims for operand in operands),
        mappings(results),
        reduction_factors=(contraction,) if contraction and contraction in labels else (),
        need_replication_factors=tuple(whole),
        **sizes,  # type: ignore[arg-type]
    )
