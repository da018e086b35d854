"""A product's weight in either form, arrays of its own or a stack, on a mesh."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.ops.weight_sharding import WeightAxes, local_spec, local_weight
from q4jax.sharding.axes import AxisLabels
from q4jax.sharding.op import Shard

Weight = WeightArrays | ArraysInStack


def weight_axes(spec: QuantSpec, weight: Weight) -> tuple[AxisLabels, Any]:
    """Label the two axes of a matrix, and its arrays in their structure."""
    if not isinstance(weight, ArraysInStack):
        axes = WeightAxes.from_arrays(spec, weight)
        return axes.weight[-2:], axes.arrays
    axes = WeightAxes.from_arrays(spec, weight.stack)
    lead = axes.packed[: len(weight.indices)]
    packed, absmax, nested, offset = axes.arrays
    if axes.nested:
        nested, offset = (*lead, *nested), (*lead, *offset)  # type: ignore[misc, assignment]
    arrays = WeightArrays(packed, absmax, nested, offset)
    return axes.weight[-2:], ArraysInStack(arrays, ((),) * len(weight.indices))  # type: ignore[arg-type]


def local_operand(
    shard: Shard, weight: Weight, spec: QuantSpec, takes_stacks: bool
) -> tuple[Weight, QuantSpec]:
    """Return one device's part of a weight, for an implementation that takes stacks or does not.

    Where the stack is split over devices, the index is clipped to the device's own weights.
    """
    if not isinstance(weight, ArraysInStack):
        return local_weight(shard, weight, spec)
    sizes = weight.stack.packed.shape
    own = ArraysInStack(
        weight.stack,
        tuple(
            jnp.clip(number, 0, size - 1) if shard.axes(_lead(i)) else number
            for i, (number, size) in enumerate(zip(_in_shard(shard, weight), sizes, strict=False))
        ),
    )
    split = shard.axes("out") or shard.axes("in")
    if takes_stacks and not (split and own.stack.offset is not None):
        return own, local_spec(shard, spec)
    one, spec = local_weight(shard, own.cut(), spec)
    if not takes_stacks:
        return one, spec
    # The statistics of a whole weight do not serve a part: its scales were decoded.
    stack = WeightArrays(own.stack.packed, one.absmax, None, None)
    return ArraysInStack(stack, own.indices), spec


def from_owner(shard: Shard, weight: Weight, result: Array) -> Array:
    """Return the result of the device that has the weight, on all devices."""
    if not isinstance(weight, ArraysInStack):
        return result
    sizes = weight.stack.packed.shape
    for i, number in enumerate(_in_shard(shard, weight)):
        axes = shard.axes(_lead(i))
        if axes:
            owns = (number >= 0) & (number < sizes[i])
            result = lax.psum(jnp.where(owns, result, 0), axes)
    return result


def _in_shard(shard: Shard, weight: ArraysInStack) -> tuple[Array, ...]:
    """The indices relative to the weights of this device."""
    found = []
    for axis, number in enumerate(weight.indices):
        label, size = _lead(axis), weight.stack.packed.shape[axis]
        if shard.axes(label):
            whole = size * shard.parts(label)
            number = jnp.clip(number, 0, whole - 1) - shard.first_index(label, size)
        found.append(number)
    return tuple(found)


def _lead(axis: int) -> str:
    return f"lead{axis}"
