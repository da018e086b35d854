"""Run an op on the caller's mesh.

- Without a mesh, or on Auto axes, through `custom_partitioning`: the compiler propagates shardings
  by the op's rule, asks how to split the op, and moves what that needs. XLA for TPU has no such
  thing, and there Auto axes are an error.
- On Auto axes, with an op that knows where its operands lie (`Placement`), through `shard_map`.
- On Explicit axes, through `shard_map`, by the same choice from the shardings in the types.
- Inside the caller's `shard_map`, on Manual axes: the operands are shards already.

On one device none of this leaves a trace in the compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from q4jax.sharding.axes import (
    AxisLabel,
    AxisLabels,
    Placement,
    ShardedOperand,
    Split,
    mesh_axes_of,
    partition_spec,
)
from q4jax.sharding.op import Shard, ShardedOp
from q4jax.sharding.propagation import mesh_axes_of_sharding, mesh_from_context, sharding_rule
from q4jax.sharding.refusal import refuse_auto_axes
from q4jax.sharding.strategy import check_weight, choose_split


def run(op: ShardedOp, *operands: Any) -> tuple[Array, ...]:
    """Compute an op's results.

    Args:
      op: the op.
      *operands: pytrees of arrays, as the op's `axes` and `local` take them.

    Raises:
      ValueError: on Explicit axes, for the reasons of `check_weight`. On Auto axes these are found
        when the program is compiled, as a `jax.errors.JaxRuntimeError` with the same text.
      NotImplementedError: the mesh has both Auto and Explicit axes. Lowered for several TPUs: its
        axes are Auto.
    """
    flat, tree = jax.tree.flatten(operands)
    return tuple(_batched(op, tree, 0)(*flat))


def axes_by_type() -> dict[AxisType, tuple[str, ...]]:
    """The axes of the surrounding mesh by type, without those of size 1."""
    mesh = jax.sharding.get_abstract_mesh()
    axes: dict[AxisType, tuple[str, ...]] = {}
    for name, axis_type in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if mesh.shape[name] > 1:
            axes[axis_type] = (*axes.get(axis_type, ()), name)
    return axes


@dataclasses.dataclass(frozen=True)
class _Call:
    """An op on flat operands, each of which has `lead` more leading axes, as `vmap` adds them."""

    op: ShardedOp
    tree: Any
    lead: int

    def sharded(
        self, arrays: Sequence[Any], mesh_axes: Sequence[Any]
    ) -> tuple[list[ShardedOperand], list[AxisLabels]]:
        """The operands with their labels and mesh axes, and the labels of the results."""
        lead = tuple(AxisLabel(f"vmap{i}") for i in range(self.lead))
        bare = [jax.ShapeDtypeStruct(a.shape[self.lead :], a.dtype) for a in arrays]
        operands, results = self.op.axes(*jax.tree.unflatten(self.tree, bare))
        labels = jax.tree.leaves(operands, is_leaf=_is_labels)
        sharded = [
            ShardedOperand((*lead, *own), tuple(array.shape), axes, array.dtype.itemsize)
            for own, array, axes in zip(labels, arrays, mesh_axes, strict=True)
        ]
        return sharded, [(*lead, *own) for own in results]

    def split(
        self,
        operands: Sequence[ShardedOperand],
        results: Sequence[ShardedOperand],
        sizes: Mapping[str, int],
    ) -> Split:
        """Choose the split; raise as `check_weight` does."""
        numbers = jax.tree.unflatten(self.tree, range(len(operands)))
        weight_operand = self.op.weight_operand
        own = [] if weight_operand is None else jax.tree.leaves(numbers[weight_operand])[:2]
        weight = [operands[i] for i in own]
        check_weight(self.op.weight_name, weight, sizes)
        others = [operand for i, operand in enumerate(operands) if i not in own]
        return choose_split(others, results, weight, self.op.contraction, sizes)

    def specs(
        self, split: Split, operands: Sequence[ShardedOperand], results: Sequence[AxisLabels]
    ) -> tuple[tuple[PartitionSpec, ...], tuple[PartitionSpec, ...]]:
        """The PartitionSpecs that the operands must have, and those of the results."""
        taken = split
        if self.op.gathers_operands:
            taken = {label: axes for label, axes in split.items() if label.startswith("vmap")}
        return (
            tuple(partition_spec(operand.labels, taken) for operand in operands),
            tuple(partition_spec(labels, split) for labels in results),
        )

    def on_shard(self, shard: Shard) -> Callable[..., Any]:
        """The function from the operands' shards to the results' shards."""
        function = functools.partial(self.op.local, shard)
        for _ in range(self.lead):
            function = jax.vmap(function)

        # A program of its own: it may have constants, which neither wrapper takes.
        @jax.jit
        def on_shard(*flat: Array) -> tuple[Array, ...]:
            return function(*jax.tree.unflatten(self.tree, flat))

        return on_shard


_UNSHARDED = Shard({}, {})


def _is_labels(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(axis, AxisLabel) for axis in node)


@functools.cache
def _batched(op: ShardedOp, tree: Any, lead: int) -> Callable[..., tuple[Array, ...]]:
    """The op under `vmap`, which adds a leading axis to every operand."""
    call = _Call(op, tree, lead)

    @custom_vmap
    def on_mesh(*flat: Array) -> tuple[Array, ...]:
        mesh, axes = jax.sharding.get_abstract_mesh(), axes_by_type()
        auto, explicit = axes.get(AxisType.Auto, ()), axes.get(AxisType.Explicit, ())
        if auto and explicit:
            raise NotImplementedError(
                f"4-bit weights on a mesh whose axes are Auto {auto} and Explicit {explicit}: "
                "make them of one type"
            )
        if explicit or (not axes and AxisType.Explicit in mesh.axis_types):
            # Those of size 1 too, which are in the operands' types.
            types = zip(mesh.axis_names, mesh.axis_types, strict=True)
            names = tuple(name for name, kind in types if kind == AxisType.Explicit)
            return _explicit(call, flat, mesh, names)
        if auto and op.placement is not None and AxisType.Manual not in axes:
            return _placed(call, op.placement, flat, mesh, auto)
        if auto and AxisType.Manual in axes:
            # There the compiler does not say how operands are sharded: it must see the computation.
            visible = dataclasses.replace(call, op=op.visible_to_compiler(auto))
            return visible.on_shard(_UNSHARDED)(*flat)
        # Without `jit` there is no program that a compiler could partition.
        if (mesh.axis_names and not auto) or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return call.on_shard(_UNSHARDED)(*flat)
        shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat)
        flat = refuse_auto_axes(op.name, flat)
        return _auto(call, shapes, tuple(mesh.shape.items()))(*flat)

    @on_mesh.def_vmap
    def _(size: int, batched: list[bool], *flat: Array) -> tuple[Any, Any]:
        if op.extra_rows and batched[0] and not any(batched[1:]):
            # More rows for the same weight, which is not to be copied for each of them.
            rows = jnp.moveaxis(flat[0], 0, lead)
            results = _batched(op, tree, lead)(rows, *flat[1:])
            return tuple(jnp.moveaxis(r, lead, 0) for r in results), (True,) * len(results)
        if op.has_stack(*jax.tree.unflatten(tree, flat)):

            def one(*flat: Array) -> tuple[Array, ...]:
                return run(op, *op.without_stacks(*jax.tree.unflatten(tree, flat)))

            results = jax.vmap(one, tuple(0 if b else None for b in batched))(*flat)
            return results, (True,) * len(results)
        full = [
            a if b else jnp.broadcast_to(a, (size, *a.shape))
            for a, b in zip(flat, batched, strict=True)
        ]
        results = _batched(op, tree, lead + 1)(*full)
        return results, (True,) * len(results)

    return on_mesh


def _explicit(
    call: _Call, flat: Sequence[Array], mesh: Any, explicit: tuple[str, ...]
) -> tuple[Array, ...]:
    """The op under `shard_map`, from the shardings in the operands' types."""
    sizes = dict(mesh.shape)
    mesh_axes = [mesh_axes_of(jax.typeof(a).sharding.spec, a.ndim, sizes) for a in flat]
    operands, results = call.sharded(flat, mesh_axes)
    function, in_specs = _on_shards(call, operands, results, sizes, explicit)
    return function(*map(jax.sharding.reshard, flat, in_specs))


def _placed(
    call: _Call, placement: Placement, flat: Sequence[Array], mesh: Any, auto: tuple[str, ...]
) -> tuple[Array, ...]:
    """The op under `shard_map` on Auto axes, from what its caller knows of the operands."""
    sizes = dict(mesh.shape)
    operands, results = call.sharded(flat, [None] * len(flat))
    numbers = jax.tree.unflatten(call.tree, range(len(flat)))
    own = jax.tree.leaves(numbers[call.op.weight_operand])[:2]
    weight, others = placement.of_labels(operands[own[0]].labels, call.op.contraction)
    operands = [
        operand._replace(
            mesh_axes=tuple(
                (weight if number in own else others).get(axis.label or "") or ()
                for axis in operand.labels
            )
        )
        for number, operand in enumerate(operands)
    ]
    return _on_shards(call, operands, results, sizes, auto)[0](*flat)


def _on_shards(
    call: _Call,
    operands: Sequence[ShardedOperand],
    results: Sequence[AxisLabels],
    sizes: Mapping[str, int],
    axes: tuple[str, ...],
) -> tuple[Callable[..., tuple[Array, ...]], tuple[PartitionSpec, ...]]:
    """The op under `shard_map` over these mesh axes, and how it takes its operands."""
    split = call.split(operands, [], sizes)
    in_specs, out_specs = call.specs(split, operands, results)
    function = jax.shard_map(
        call.on_shard(Shard(split, sizes)),
        axis_names=set(axes),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )
    return function, in_specs


@functools.lru_cache(1024)
def _auto(
    call: _Call, shapes: tuple[jax.ShapeDtypeStruct, ...], context: tuple[tuple[str, int], ...]
) -> Callable[..., Any]:
    """The op for a compiler that partitions; `context` is the mesh of `jax.set_mesh`."""
    function = custom_partitioning(call.on_shard(_UNSHARDED))

    def partition(mesh: Mesh, arguments: Any, wanted: Any) -> Any:
        if mesh.empty:
            mesh = mesh_from_context(arguments[0], context)
        sizes = dict(mesh.shape)
        operands, results = call.sharded(
            arguments, [mesh_axes_of_sharding(a, mesh) for a in arguments]
        )
        goals = [
            ShardedOperand(labels, r.shape, mesh_axes_of_sharding(r, mesh))
            for labels, r in zip(results, wanted, strict=True)
        ]
        split = call.split(operands, goals, sizes)
        in_shardings, out_shardings = (
            tuple(NamedSharding(mesh, spec) for spec in specs)
            for specs in call.specs(split, operands, results)
        )
        return mesh, call.on_shard(Shard(split, sizes)), out_shardings, in_shardings

    operands, results = call.sharded(shapes, [None] * len(shapes))
    # JAX does not decode the shardings: it can only where the program names its mesh, and it
    # raises where a mesh axis is split in parts.
    rule = sharding_rule(operands, results, call.op.contraction)
    function.def_partition(partition, decode_shardings=False, sharding_rule=rule)
    return function
