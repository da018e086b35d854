"""`PlacedSpec`: the description of a weight that also says where the weight lies on a mesh."""

import dataclasses
from typing import Any

from q4jax.core.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class PlacedSpec(QuantSpec):
    """The description of a weight whose operations are split as it says, not as a compiler decides.

    It exists while a program is traced whose mesh axes are the compiler's: arrays do not tell how
    they are sharded there.

    Attributes:
      mesh_axes: the mesh axes of each axis of the codes and scales, leading ones included.
      batch: the mesh axes of the first axis of the arrays that the weight is multiplied by.
    """

    mesh_axes: tuple[tuple[str, ...], ...] = ()
    batch: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, spec: QuantSpec, mesh_axes: tuple[tuple[str, ...], ...], batch: tuple[str, ...]
    ) -> "PlacedSpec":
        """Return a weight's description with its place."""
        fields: dict[str, Any] = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        return cls(**{**fields, "mesh_axes": mesh_axes, "batch": batch})
