"""Choose which mesh axes split an op, given how its operands and results are sharded."""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from q4jax.sharding.axes import MeshAxes, ShardedOperand, Split, max_parts


def choose_split(
    operands: Sequence[ShardedOperand],
    results: Sequence[ShardedOperand],
    weight: Sequence[ShardedOperand],
    contraction: str | None,
    sizes: Mapping[str, int],
) -> Split:
    """Choose the split that moves the fewest bytes, by a rule of precedence.

    Each mesh axis goes to the first of these that it shards: leading axes of the weight; the
    contraction, where both the weight and another operand are sharded along it; the results and
    the batch of the operands, the batch first where the operands are larger than the weight; the
    weight; the operands. So a weight stays where it is, unless the batch is sharded over the same
    mesh axis. Then the weight's codes and scales are gathered, or the operands if they are smaller.

    Args:
      operands: all operands but the weight's.
      results: the op's results.
      weight: the weight's codes and scales, or nothing.
      contraction: the label that the op sums over.
      sizes: the sizes of the mesh axes.
    """
    fixed = weight[0].sharded_axes() if weight else {}
    given = [operand.sharded_axes() for operand in operands]
    wanted = [result.sharded_axes() for result in results]
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
    parts = max_parts([*operands, *results, *weight])
    split: dict[str, MeshAxes] = {}
    for label, axes in claims:
        taken = {axis for used in split.values() for axis in used}
        free = tuple(axis for axis in axes if axis not in taken)
        if free and label not in split and parts[label] % math.prod(sizes[a] for a in free) == 0:
            split[label] = free
    return split


def check_weight(name: str, weight: Sequence[ShardedOperand], sizes: Mapping[str, int]) -> None:
    """Check that codes and scales are sharded alike and that no block is split.

    Args:
      name: the weight's name in errors.
      weight: its codes and its scales, or nothing.
      sizes: the sizes of the mesh axes.

    Raises:
      ValueError: they are sharded differently, or a mesh axis does not divide the blocks or rows.
    """
    if not weight:
        return
    packed, absmax = weight[:2]
    codes, scales = packed.sharded_axes(), absmax.sharded_axes()
    # Before the two are compared: scales that a mesh axis does not divide are unsharded.
    for what, array in (("packed", packed), ("absmax", absmax)):
        for label, axes in array.sharded_axes().items():
            parts, units = math.prod(sizes[a] for a in axes), max_parts(weight)[label]
            if units % parts:
                noun = "blocks a row" if label == "in" else f"{label} rows"
                raise ValueError(
                    f"{name}: {what} {list(array.shape)} is split over the mesh axes "
                    f"{'+'.join(axes)} of size {parts}, which does not divide its {units} {noun}"
                )
    if codes != scales:
        raise ValueError(
            f"{name}: packed {list(packed.shape)} is split as {_spec(packed)} and absmax "
            f"{list(absmax.shape)} as {_spec(absmax)}: they must be split alike"
        )


def _spec(array: ShardedOperand) -> PartitionSpec:
    return PartitionSpec(*(axes or None for axes in array.mesh_axes or ()))
