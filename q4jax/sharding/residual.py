"""Keep the feature axis of a residual stream unsharded on Auto meshes."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType

from q4jax.sharding.axes import REPLICATED, AxisLabels, batch_labels
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


@jax.custom_vjp
def whole_features(x: Array) -> Array:
    """Keep the last axis of `x [..., features]` unsharded, in the gradient too.

    Otherwise the partitioner propagates the feature sharding of the weights into the residual
    stream and drops its batch sharding. On Explicit or Manual mesh axes this returns `x`.
    """
    if axes_by_type().keys() - {AxisType.Auto}:
        return x
    return run(_WholeFeatures(), x)[0]


whole_features.defvjp(lambda x: (whole_features(x), None), lambda _, g: (whole_features(g),))


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
