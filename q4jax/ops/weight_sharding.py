"""The axes of a 4-bit weight's arrays, and one device's part of a weight."""

import dataclasses
import functools
from typing import NamedTuple

from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.core.placed_spec import PlacedSpec
from q4jax.core.spec import QuantSpec
from q4jax.sharding.axes import REPLICATED, AxisLabel, AxisLabels, Placement
from q4jax.sharding.op import Shard
from q4jax.xla.by_platform import by_platform
from q4jax.xla.tpu import scales as tpu_scales


class WeightAxes(NamedTuple):
    """The labels of a weight's axes, and of the axes of its codes and scales.

    In the row form, rows are labelled "out", columns "in" and leading axes "lead0" and so on, and
    the blocks of a row are never split. The arrays of the flat form are never sharded.
    """

    weight: AxisLabels
    packed: AxisLabels
    absmax: AxisLabels
    nested: bool

    @classmethod
    def from_spec(cls, spec: QuantSpec, lead: int, *, nested: bool) -> "WeightAxes":
        """Label a weight.

        Args:
          spec: the weight's description.
          lead: the number of its leading axes.
          nested: whether its scales are double-quantized.
        """
        if not spec.in_rows:
            flat = (REPLICATED,) * (lead + 1)
            return cls((REPLICATED,) * (lead + len(spec.shape)), flat, flat, nested)
        leading = (AxisLabel(f"lead{i}") for i in range(lead))
        rows = (*leading, *(AxisLabel("out"),) * (len(spec.shape) - 1))
        units = (spec.blocksize, spec.blocksize // 2, 1)
        weight, packed, absmax = ((*rows, AxisLabel("in", unit)) for unit in units)
        return cls(weight, packed, absmax, nested)

    @classmethod
    def from_arrays(cls, spec: QuantSpec, arrays: WeightArrays) -> "WeightAxes":
        """Label the weight that has these arrays."""
        lead = arrays.packed.ndim - len(spec.packed_shape)
        return cls.from_spec(spec, lead, nested=arrays.offset is not None)

    @property
    def arrays(self) -> WeightArrays:
        """The labels in the structure of the weight's arrays."""
        statistics = ((REPLICATED,), ()) if self.nested else (None, None)
        return WeightArrays(self.packed, self.absmax, *statistics)  # type: ignore[arg-type]


def placement_of(spec: QuantSpec) -> Placement | None:
    """Return where a weight lies, if its description says so."""
    return Placement(spec.mesh_axes, spec.batch) if isinstance(spec, PlacedSpec) else None


def local_spec(shard: Shard, spec: QuantSpec) -> QuantSpec:
    """Return the description of one device's part of a weight."""
    rows, row = spec.shape[:-1], spec.shape[-1]
    shape = (*(n // shard.parts("out") for n in rows), row // shard.parts("in"))
    return dataclasses.replace(spec, shape=shape)


def local_weight(
    shard: Shard, arrays: WeightArrays, spec: QuantSpec
) -> tuple[WeightArrays, QuantSpec]:
    """Return one device's part of a weight, as a weight that is complete.

    Nested scales are counted over the complete weight. Where the weight is sharded, they are
    decoded here.
    """
    local = local_spec(shard, spec)
    if arrays.nested_absmax is None or arrays.offset is None:
        return arrays, local
    labels = [axis.label for axis in WeightAxes.from_arrays(spec, arrays).absmax]
    if not any(map(shard.axes, labels)):
        return arrays, spec
    shape = arrays.absmax.shape
    first = [shard.first_index(label, size) for label, size in zip(labels, shape, strict=True)]
    full = tuple(size * shard.parts(label) for label, size in zip(labels, shape, strict=True))
    scales = by_platform(
        *arrays[1:],
        first,
        tpu=functools.partial(tpu_scales.decode_part, whole=full),
        default=functools.partial(blockwise.decode_absmax_part, whole=full),
    )
    plain = dataclasses.replace(local, nested_blocksize=0)
    return WeightArrays(arrays.packed, scales, None, None), plain
