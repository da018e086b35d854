"""`WeightOp`, the base class of the ops on 4-bit weights."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jax import Array, lax

from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.core.spec import QuantSpec
from q4jax.ops.registry import AUTOMATIC, IMPLEMENTATIONS, Implementation
from q4jax.ops.weight_sharding import placement_of
from q4jax.sharding.axes import MeshAxes, Placement
from q4jax.sharding.op import Shard, ShardedOp


@dataclasses.dataclass(frozen=True)
class WeightOp(ShardedOp):
    """An op that an implementation computes on each device.

    To add one, subclass it in a file of its own, implement `axes` and `compute`, and run it with
    `q4jax.sharding.partition.run`.

    Attributes:
      spec: the weight's description.
      implementation: the caller's choice; None for the best of each platform.
    """

    spec: QuantSpec
    implementation: Implementation | None

    @property
    def weight_name(self) -> str:
        """The weight's tag."""
        return self.spec.tag()

    @property
    def placement(self) -> Placement | None:
        """Where the weight lies, if its description says so."""
        return placement_of(self.spec)

    def compute(
        self, shard: Shard, implementation: Implementation, *operands: Any
    ) -> tuple[Array, ...]:
        """Compute one device's results with an implementation."""
        raise NotImplementedError

    def profile(self, *operands: Any) -> tuple[np.dtype[Any], int | None]:
        """The dtype and the rows by which an implementation is preferred."""
        raise NotImplementedError

    def local(self, shard: Shard, *operands: Any) -> tuple[Array, ...]:
        """Compute one device's results with the caller's or the platform's implementation.

        The platform is that for which the program is lowered.
        """
        if self.implementation is not None:
            return self.compute(shard, self.implementation, *operands)
        platforms = {
            platform: functools.partial(self._first_of, candidates, shard)
            for platform, candidates in AUTOMATIC.items()
        }
        default = functools.partial(self._first_of, (), shard)
        return lax.platform_dependent(*operands, default=default, **platforms)

    def _first_of(
        self, candidates: tuple[Implementation, ...], shard: Shard, *operands: Any
    ) -> tuple[Array, ...]:
        """Compute with the first candidate that is preferred and serves the call, else "xla"."""
        dtype, rows = self.profile(*operands)
        for implementation in candidates:
            if implementation.is_preferred(self.name, dtype, rows):
                try:
                    return self.compute(shard, implementation, *operands)
                except NotImplementedError:
                    continue
        return self.compute(shard, IMPLEMENTATIONS["xla"], *operands)

    def has_stack(self, *operands: Any) -> bool:
        """Whether the weight is in a stack."""
        return any(isinstance(operand, ArraysInStack) for operand in operands)

    def without_stacks(self, *operands: Any) -> tuple[Any, ...]:
        """Return the operands with arrays of a weight's own in the place of its stack."""
        return tuple(o.cut() if isinstance(o, ArraysInStack) else o for o in operands)

    def visible_to_compiler(self, mesh_axes: MeshAxes) -> "WeightOp":
        """Return the op in plain XLA."""
        xla = IMPLEMENTATIONS["xla"]
        if self.implementation not in (None, xla):
            raise NotImplementedError(
                f"implementation={self.implementation.name!r} inside a shard_map that leaves the "
                f"mesh axes {mesh_axes} to the compiler: make them manual too"
            )
        return dataclasses.replace(self, implementation=xla)
