"""Which mesh axes split an operation, from how its operands and results lie."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from q4jax.ops.weight_sharding import Axes, Dims, Split


class Placed(NamedTuple):
    """An array of an operation and how it lies.

    Attributes:
      dims: what its axes mean.
      shape: sizes of all devices together.
      axes: for each axis, the mesh axes that split it; None: not known.
      itemsize: bytes of an element.
    """

    dims: Dims
    shape: tuple[int, ...]
    axes: tuple[Axes, ...] | None
    itemsize: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all devices together."""
        return math.prod(self.shape) * self.itemsize

    def claims(self) -> dict[str, Axes]:
        """Label -> the mesh axes that split it here."""
        found = zip(self.dims, self.axes or (), strict=False)
        return {dim.label: axes for dim, axes in found if dim.label is not None and axes}


def spec_axes(spec: Any, ndim: int, sizes: Mapping[str, int]) -> tuple[Axes, ...]:
    """The mesh axes of each of `ndim` axes; those of size 1 split nothing and are left out."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    tuples = ((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in tuples)


def units(arrays: Iterable[Placed]) -> dict[str, int]:
    """Label -> into how many parts it can be split at most."""
    found: dict[str, int] = {}
    for array in arrays:
        for dim, size in zip(array.dims, array.shape, strict=True):
            if dim.label is not None:
                found[dim.label] = size // dim.unit
    return found


def partition_spec(dims: Dims, split: Split) -> PartitionSpec:
    """How an array with these axes lies."""
    return PartitionSpec(*(split.get(dim.label or "") or None for dim in dims))


def decide(
    operands: Sequence[Placed],
    results: Sequence[Placed],
    weight: Sequence[Placed],
    contraction: str | None,
    sizes: Mapping[str, int],
) -> Split:
    """The split that moves least, as a rule of precedence.

    A mesh axis goes to the first that has it of: leading axes of the weight; the contraction, where
    the weight and the other operand are both split by it; the results and the batch of the other
    operands, whose batch comes first where it is more bytes than the weight; the weight; the other
    operands. So a weight stays where it lies, unless the batch is split over the same axis: then
    its codes and scales are gathered, as bytes, or a smaller batch is.

    Args:
      operands: all but the weight's.
      results: those of the operation.
      weight: the weight's codes and scales, if there are any.
      contraction: the label that is summed over.
      sizes: of the mesh axes.
    """
    fixed = weight[0].claims() if weight else {}
    given = [operand.claims() for operand in operands]
    wanted = [result.claims() for result in results]
    claims = [(label, axes) for label, axes in fixed.items() if label.startswith(("vmap", "lead"))]
    for other in given:
        if contraction in other and contraction in fixed:
            both = tuple(axis for axis in fixed[contraction] if axis in other[contraction])
            claims.append((contraction, both))
    goals = [claim for one in wanted for claim in one.items()]
    batch = [claim for one in given for claim in one.items() if claim[0].startswith("batch")]
    larger = sum(o.nbytes for o in operands) > sum(w.nbytes for w in weight)
    claims += [*batch, *goals] if larger else [*goals, *batch]
    claims += fixed.items()
    claims += [claim for one in given for claim in one.items()]
    parts = units([*operands, *results, *weight])
    split: dict[str, Axes] = {}
    for label, axes in claims:
        taken = {axis for used in split.values() for axis in used}
        free = tuple(axis for axis in axes if axis not in taken)
        if free and label not in split and parts[label] % math.prod(sizes[a] for a in free) == 0:
            split[label] = free
    return split


def check_weight(name: str, weight: Sequence[Placed], sizes: Mapping[str, int]) -> None:
    """ValueError where codes and scales lie differently, or a block or a byte would be split."""
    if not weight:
        return
    packed, absmax = weight[:2]
    codes, scales = packed.claims(), absmax.claims()
    # Before the two are compared: scales that an axis does not divide lie whole.
    for what, array in (("packed", packed), ("absmax", absmax)):
        for label, axes in array.claims().items():
            parts, units_ = math.prod(sizes[a] for a in axes), units(weight)[label]
            if units_ % parts:
                noun = "blocks a row" if label == "in" else f"{label} rows"
                raise ValueError(
                    f"{name}: {what} {list(array.shape)} is split over the mesh axes "
                    f"{'+'.join(axes)} of size {parts}, which does not divide its {units_} {noun}"
                )
    if codes != scales:
        raise ValueError(
            f"{name}: packed {list(packed.shape)} is split as {_show(packed)} and absmax "
            f"{list(absmax.shape)} as {_show(absmax)}: they must be split alike"
        )


def _show(array: Placed) -> str:
    return str(PartitionSpec(*(axes or None for axes in array.axes or ())))
