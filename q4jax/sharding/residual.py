"""Keep the feature axis of a residual stream unsharded on Auto meshes."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from q4jax.sharding.axes import REPLICATED, AxisLabels, MeshAxes, batch_labels
from q4jax.sharding.op import Shard, ShardedOp
from q4jax.sharding.partition import axes_by_type, run

_whole_outputs: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "whole_outputs", default=False
)


@contextlib.contextmanager
def whole_outputs() -> Iterator[None]:
    """Have each `matmul_4bit` traced inside all-gather its output features.

    For layers that write to a residual stream. Otherwise the partitioner shards their outputs like
    the weight's output axis wherever the batch was to be sharded over the same mesh axis.
    """
    token = _whole_outputs.set(True)
    try:
        yield
    finally:
        _whole_outputs.reset(token)


def outputs_are_whole() -> bool:
    """Return whether the caller is inside `whole_outputs`."""
    return _whole_outputs.get()


_batch: contextvars.ContextVar[MeshAxes | None] = contextvars.ContextVar("batch", default=None)


@contextlib.contextmanager
def split_batches(axes: MeshAxes) -> Iterator[None]:
    """Have each `whole_features` traced inside split its first axis over these Auto mesh axes."""
    token = _batch.set(axes)
    try:
        yield
    finally:
        _batch.reset(token)


def whole_features(x: Array) -> Array:
    """Keep the last axis of `x [..., features]` unsharded, in the gradient too.

    Otherwise the partitioner propagates the feature sharding of the weights into the residual
    stream and drops its batch sharding. On Explicit or Manual mesh axes this returns `x`.
    """
    batch, axes = _batch.get(), axes_by_type()
    if batch is None or axes.keys() != {AxisType.Auto}:
        return _whole_features(x)
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in batch)
    split = x.shape[0] % parts == 0
    return jax.lax.with_sharding_constraint(x, PartitionSpec((batch if split else ()) or None))


def whole_stack(stack: Array) -> Array:
    """Gather the first axis of a stack, of which a loop is to take an entry a step.

    Within `split_batches`. Otherwise the compiler for TPUs gathers the stack in each step, since
    the entry's number is not known. Elsewhere this returns `stack`.
    """
    if _batch.get() is None or axes_by_type().keys() != {AxisType.Auto}:
        return stack
    others = (PartitionSpec.UNCONSTRAINED,) * (stack.ndim - 1)
    return jax.lax.with_sharding_constraint(stack, PartitionSpec(None, *others))


@jax.custom_vjp
def _whole_features(x: Array) -> Array:
    if axes_by_type().keys() - {AxisType.Auto}:
        return x
    return run(_WholeFeatures(), x)[0]


_whole_features.defvjp(lambda x: (_whole_features(x), None), lambda _, g: (_whole_features(g),))


@dataclasses.dataclass(frozen=True)
class _WholeFeatures(ShardedOp):
    """The identity on `x [..., features]` whose features are never sharded."""

    name, extra_rows = "whole_features", True

    def axes(self, x: Array) -> tuple[Any, tuple[AxisLabels, ...]]:
        labels = (*batch_labels(x.shape[:-1]), REPLICATED)
        return (labels,), (labels,)

    def local(self, shard: Shard, x: Array) -> tuple[Array, ...]:
        del shard
        return (x,)
