"""Embedding lookup: rows of a 4-bit table, without decoding the others."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec, float_dtype
from q4jax.ops.params import Params4bit, as_params4bit
from q4jax.ops.weight_sharding import WeightAxes, local_weight, placement_of
from q4jax.sharding.axes import AxisLabels, ExplicitSharding, Placement, batch_labels, mesh_axes_of
from q4jax.sharding.op import Shard, ShardedOp
from q4jax.sharding.partition import run


def take_rows(weight: Params4bit, ids: Array, dtype: Any = None) -> Array:
    """Return `dequantize_4bit(weight)[ids]`, decoding only the rows with these ids.

    Args:
      weight: a 2-D table `[rows, features]`.
      ids: integers of any shape; an id out of range gives NaN, as in `jnp.take`.
      dtype: dtype of the result; None takes the dtype that the table was quantized from.

    Returns:
      `[*ids.shape, features]`.

    Raises:
      ValueError: ids are not integers; the table is not 2-D.
    """
    weight = as_params4bit(weight)
    state = weight.quant_state
    if len(state.shape) != 2:
        raise ValueError(f"take_rows: quant_state.shape must be 2D, got {list(state.shape)}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    return _take(weight, ids, state.dtype if dtype is None else float_dtype(dtype))


def widen(ids: Array) -> Array:
    """Return integers in at least 32 bits: their own dtype may not hold the size of a table."""
    if ids.dtype.itemsize >= 4:
        return ids
    unsigned = jnp.issubdtype(ids.dtype, jnp.unsignedinteger)
    return ids.astype(jnp.uint32 if unsigned else jnp.int32)


def take_dense_rows(table: Array, ids: Array) -> Array:
    """Return rows of a dense table, as `jnp.take`, also for ids on explicit mesh axes."""
    sharding = ExplicitSharding.from_array(ids).sharding
    if sharding is not None:
        spec = mesh_axes_of(sharding.spec, ids.ndim + 1, sharding.mesh.shape)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, out_sharding=sharding)


@functools.partial(jax.jit, static_argnames="dtype")
def _take(weight: Params4bit, ids: Array, dtype: np.dtype[Any]) -> Array:
    spec = weight.quant_state.spec
    count = spec.shape[0]
    ids = widen(ids)
    if not jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.where(ids < 0, ids + count, ids)
    inside = (ids >= 0) & (ids < count)
    own = jnp.where(inside, ids, 0).astype(jnp.int32)
    (rows,) = run(TakeRows(spec, dtype), own, weight.arrays)
    return jnp.where(inside[..., None], rows, jnp.nan)


@dataclasses.dataclass(frozen=True)
class TakeRows(ShardedOp):
    """Rows of a table: operands `(ids, arrays)`, with ids within the table.

    Attributes:
      spec: the table's description.
      dtype: dtype of the result.
    """

    name, contraction, weight_operand, extra_rows = "take_rows", "out", 1, True
    spec: QuantSpec
    dtype: np.dtype[Any]

    @property
    def weight_name(self) -> str:
        """The table's tag."""
        return self.spec.tag()

    @property
    def placement(self) -> Placement | None:
        """Where the table lies, if its description says so."""
        return placement_of(self.spec)

    def axes(self, ids: Array, arrays: WeightArrays) -> tuple[Any, tuple[AxisLabels, ...]]:
        """Label the ids, the table and the rows."""
        table = WeightAxes.from_arrays(self.spec, arrays)
        batch = batch_labels(ids.shape)
        return (batch, table.arrays), ((*batch, table.weight[-1]),)

    def local(self, shard: Shard, ids: Array, arrays: WeightArrays) -> tuple[Array, ...]:
        """Take the rows that this device has, and add those of the others."""
        arrays, spec = local_weight(shard, arrays, self.spec)
        if not shard.axes("out"):
            return (blockwise.take_rows(arrays, ids, spec, self.dtype),)
        own = ids - shard.first_index("out", spec.shape[0])
        inside = (own >= 0) & (own < spec.shape[0])
        rows = blockwise.take_rows(arrays, jnp.where(inside, own, 0), spec, self.dtype)
        return (shard.sum(jnp.where(inside[..., None], rows, 0), "out"),)  # one part is not zero
