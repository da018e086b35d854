"""The geometry of a tile of weights in a GPU kernel."""

import dataclasses

from jax import Array

from q4jax.core.spec import QuantSpec

HALF = 32
"""The number of weights in 16 bytes, which a thread loads at once."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A tile of `rows` x `columns` weights, decoded in units of one or two halves of 32.

    A thread that owns both halves of a unit computes one table for its 64 weights. Therefore a
    tile is decoded a half at a time: half h of all its units, [rows, columns / halves].

    Attributes:
      spec: the weight's description.
      rows: the rows of a tile, a power of two.
      columns: the columns of a tile, a power of two.
      inside: whether every tile is inside the weight, so that nothing is masked.
    """

    spec: QuantSpec
    rows: int
    columns: int
    inside: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""
        n, k = self.spec.shape
        return n, k

    @property
    def unit(self) -> int:
        """The weights of a unit, which share a scale."""
        return min(self.spec.blocksize, 2 * HALF)

    @property
    def halves(self) -> int:
        """The halves of a unit."""
        return self.unit // HALF

    @property
    def units(self) -> int:
        """The units in a row of the tile."""
        return self.columns // self.unit

    @property
    def scales(self) -> int:
        """The scales in a row of the tile."""
        return max(1, self.columns // self.spec.blocksize)

    def activation(self, x: Array) -> Array:
        """View the activation [M, K] as [M, units, unit]."""
        return x.reshape(x.shape[0], -1, self.unit)
