"""`BinaryEinsum`: an einsum of an input and a kernel, computed as a product of matrices."""

import dataclasses
from collections.abc import Callable, Iterable

from jax import Array

from q4jax.convert.kernel_axes import KernelAxes

Product = Callable[[Array], Array]
"""A product of `[*batch, rows, in]` with matrices, `[*batch, rows, out]`."""


@dataclasses.dataclass(frozen=True)
class BinaryEinsum:
    """An einsum of an input and a kernel that is a product of matrices.

    Attributes:
      x: letters of the input, perhaps with one "...".
      w: letters of the kernel.
      y: letters of the result, perhaps with one "...".
    """

    x: str
    w: str
    y: str

    @classmethod
    def parse(cls, equation: str) -> "BinaryEinsum":
        """Parse an equation such as `"BTD,NDH->BTNH"`.

        Raises:
          ValueError: it is not an explicit einsum of two operands, or more than a product of
            matrices: a letter twice in one place, or in one place only.

        Examples:
          >>> BinaryEinsum.parse("BTD,NDH->BTNH").kernel_axes((8, 256, 32)).in_axes
          (1,)
        """
        text = equation.replace(" ", "")
        operands, arrow, y = text.partition("->")
        x, comma, w = operands.partition(",")
        if not arrow or not comma or "," in w:
            raise ValueError(f"{equation!r} is no einsum of two operands with a '->'")
        for part in (x, w, y):
            plain = part.replace("...", "", 1)
            if len(set(plain)) < len(plain) or not (plain.isalpha() or not plain):
                raise ValueError(f"{equation!r}: {part!r} must be different letters")
        if "..." in w or ("..." in x) != ("..." in y):
            raise ValueError(f"{equation!r}: '...' must be in the input and the result alone")
        count = {
            letter: sum(letter in part for part in (x, w, y)) for letter in {*x, *w, *y} - {"."}
        }
        alone = sorted(letter for letter, times in count.items() if times < 2)
        if alone:
            raise ValueError(f"{equation!r}: {alone} are in one place only")
        return cls(x, w, y)

    def __str__(self) -> str:
        return f"{self.x},{self.w}->{self.y}"

    def kernel_axes(self, shape: Iterable[int]) -> KernelAxes:
        """Return the axes of a kernel of this shape.

        Raises:
          ValueError: the kernel has another number of axes, or no input or output axis.
        """
        shape = tuple(shape)
        if len(shape) != len(self.w):
            raise ValueError(f"{self}: a weight {list(shape)} has not the axes {self.w!r}")
        inputs = [axis for axis, letter in enumerate(self.w) if letter not in self.y]
        batch = [
            axis for axis, letter in enumerate(self.w) if letter in self.x and letter in self.y
        ]
        return KernelAxes(shape, tuple(inputs), tuple(batch))

    def expand(self, ndim: int) -> "BinaryEinsum":
        """Return the equation for inputs of `ndim` axes, with letters in the place of "..."."""
        if "..." not in self.x:
            return self
        free = [chr(n) for n in range(0x3B1, 0x3B1 + ndim)]  # Greek letters, which no equation uses
        dots = "".join(free[: ndim - len(self.x) + 3])
        return BinaryEinsum(self.x.replace("...", dots), self.w, self.y.replace("...", dots))

    def apply(self, x: Array, product: Product, axes: KernelAxes) -> Array:
        """Compute the einsum by a product of matrices.

        Args:
          x: the input.
          product: maps rows `[*batch, rows, in]` to `[*batch, rows, out]`.
          axes: the axes of the kernel.

        Raises:
          ValueError: the input does not fit the equation or the weight.
        """
        this = self.expand(x.ndim)
        sizes = dict(zip(this.x, x.shape, strict=False))
        weight = dict(zip(this.w, axes.shape, strict=True))
        if len(this.x) != x.ndim or any(sizes[k] != weight[k] for k in sizes.keys() & weight):
            raise ValueError(f"{self}: the input is {list(x.shape)}, the weight {list(axes.shape)}")
        batch, inputs, outputs = (
            "".join(this.w[axis] for axis in numbers)
            for numbers in (axes.batch_axes, axes.in_axes, axes.out_axes)
        )
        free = "".join(letter for letter in this.x if letter not in this.w)
        rows = x.transpose([this.x.index(letter) for letter in batch + free + inputs])
        y = product(rows.reshape(*axes.lead, -1, axes.matrix[1]))
        found = batch + free + outputs
        sizes |= weight
        y = y.reshape([sizes[letter] for letter in found])
        return y.transpose([found.index(letter) for letter in this.y])

    def spread(self, bias: Array, ndim: int, axes: KernelAxes) -> Array:
        """Reshape a bias, whose axes follow the result's order, so that it adds to the result."""
        this = self.expand(ndim)
        weight = dict(zip(this.w, axes.shape, strict=True))
        return bias.reshape([weight.get(letter, 1) for letter in this.y])
