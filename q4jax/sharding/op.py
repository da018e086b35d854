"""`ShardedOp`, the base class of ops that a mesh may split, and `Shard`, one device's part."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from jax import Array, lax

from q4jax.sharding.axes import AxisLabels, MeshAxes, Placement, Split


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's part of an op.

    Attributes:
      split: the mesh axes of each label that is sharded; empty for unsharded operands.
      sizes: the sizes of these mesh axes.
    """

    split: Split
    sizes: Mapping[str, int]

    def axes(self, label: str | None) -> MeshAxes:
        """The mesh axes that shard a label."""
        return tuple(self.split.get(label, ())) if label else ()

    def parts(self, label: str | None) -> int:
        """The number of parts that a label is split into."""
        return math.prod(self.sizes[axis] for axis in self.axes(label))

    def first_index(self, label: str | None, size: int) -> Array | int:
        """The global index of this shard's first element, where a shard has `size` of them."""
        axes = self.axes(label)
        return lax.axis_index(axes) * size if axes else 0

    def sum(self, part: Array, label: str | None) -> Array:
        """Sum the parts of all shards along a label that the op contracts."""
        axes = self.axes(label)
        return lax.psum(part, axes) if axes else part


class ShardedOp:
    """An op on arrays that a mesh may split.

    To add an op, subclass it in a file of its own as a frozen dataclass whose fields are static,
    implement `axes` and `local`, and call `partition.run(MyOp(...), *operands)`. Operands are
    pytrees of arrays; results are tuples of arrays.

    Attributes:
      name: the op's name in errors and tuning tables.
      contraction: the label that the op sums over.
      weight_operand: the index of the operand that is a weight. Its first two leaves, codes and
        scales, must be sharded alike.
      extra_rows: whether `vmap` over the first operand alone only adds rows to it.
      gathers_operands: whether each shard needs the unsharded operands to compute its results.
    """

    name: ClassVar[str]
    contraction: ClassVar[str | None] = None
    weight_operand: ClassVar[int | None] = None
    extra_rows: ClassVar[bool] = False
    gathers_operands: ClassVar[bool] = False

    @property
    def weight_name(self) -> str:
        """The name of the weight in errors about its sharding."""
        return self.name

    @property
    def placement(self) -> Placement | None:
        """Where the operands lie; None: the compiler knows, or their types say it."""
        return None

    def axes(self, *operands: Any) -> tuple[Any, tuple[AxisLabels, ...]]:
        """Label the axes of the operands (a pytree like theirs) and of each result."""
        raise NotImplementedError

    def local(self, shard: Shard, *operands: Any) -> tuple[Array, ...]:
        """Compute one device's results from its operands."""
        raise NotImplementedError

    def has_stack(self, *operands: Any) -> bool:
        """Whether an operand is a stack with an index, not to be repeated for each of a batch."""
        del operands
        return False

    def without_stacks(self, *operands: Any) -> tuple[Any, ...]:
        """Return the operands with what the indices name in the place of the stacks."""
        return operands

    def visible_to_compiler(self, mesh_axes: MeshAxes) -> "ShardedOp":
        """The same op in operations that the compiler can partition over `mesh_axes`.

        Raises:
          NotImplementedError: the op has no such form.
        """
        del mesh_axes
        return self
