"""How the axes of any weight make the matrix `[out, in]` along whose rows 4-bit blocks run."""

import dataclasses
import math
from collections.abc import Callable, Iterable

from jax import Array

Product = Callable[[Array], Array]
"""`[*batch, rows, in]` to `[*batch, rows, out]`."""


@dataclasses.dataclass(frozen=True)
class Fold:
    """A weight of any shape as matrices `[*batch, out, in]`, and back.

    Args:
      shape: of the weight, without the leading axes that `vmap` or `scan` stack.
      inputs: the axes that a product with the input sums over; blocks run along them.
      batch: the axes that weight, input and result share: one matrix for each (experts).

    The other axes are outputs. `inputs` and outputs keep the order that they have in the weight.

    Raises:
      ValueError: an axis is not there or is named twice; no input or no output is left.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> heads = q4jax.Fold((8, 256, 32), inputs=(1,))  # [heads, features, width]
      >>> heads.fold(jnp.ones((8, 256, 32))).shape, heads.lead, heads.matrix
      ((256, 256), (), (256, 256))
      >>> experts = q4jax.Fold((4, 64, 128), inputs=(1,), batch=(0,))
      >>> experts.fold(jnp.ones((4, 64, 128))).shape
      (4, 128, 64)
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("shape", "inputs", "batch"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        named = (*self.inputs, *self.batch)
        axes = range(len(self.shape))
        if len(set(named)) < len(named) or not set(named) <= set(axes):
            raise ValueError(
                f"inputs={self.inputs} and batch={self.batch} must be different axes of "
                f"{list(self.shape)}, from 0 on"
            )
        if not self.inputs or not self.outputs:
            missing = "outputs" if self.inputs else "inputs"
            raise ValueError(
                f"a weight {list(self.shape)} with inputs={self.inputs} and batch={self.batch} "
                f"has no {missing}"
            )

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes that are neither summed over nor batched."""
        return tuple(
            axis for axis in range(len(self.shape)) if axis not in (*self.inputs, *self.batch)
        )

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return self.sizes(self.batch)

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in)."""
        return math.prod(self.sizes(self.outputs)), math.prod(self.sizes(self.inputs))

    def sizes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """The sizes of axes of the weight."""
        return tuple(self.shape[axis] for axis in axes)

    def fold(self, w: Array) -> Array:
        """`[*stack, *shape]` to `[*stack, *batch, out, in]`."""
        stack = w.shape[: w.ndim - len(self.shape)]
        if tuple(w.shape[len(stack) :]) != self.shape:
            raise ValueError(f"the weight must be {list(self.shape)}, got {list(w.shape)}")
        order = (*self.batch, *self.outputs, *self.inputs)
        axes = (*range(len(stack)), *(len(stack) + axis for axis in order))
        return w.transpose(axes).reshape(*stack, *self.lead, *self.matrix)

    def unfold(self, matrices: Array) -> Array:
        """The inverse of `fold`."""
        stack = matrices.shape[: matrices.ndim - len(self.lead) - 2]
        order = (*self.batch, *self.outputs, *self.inputs)
        w = matrices.reshape(*stack, *self.sizes(order))
        back = (len(stack) + order.index(axis) for axis in range(len(order)))
        return w.transpose(*range(len(stack)), *back)


@dataclasses.dataclass(frozen=True)
class Equation:
    """An einsum of an input and a weight, of which the result keeps every other axis.

    Attributes:
      x: letters of the input; it may hold one "...".
      w: letters of the weight.
      y: letters of the result.
    """

    x: str
    w: str
    y: str

    @classmethod
    def parse(cls, equation: str) -> "Equation":
        """Reads `"BTD,NDH->BTNH"`.

        Raises:
          ValueError: it is not an explicit einsum of two operands, or more than a product of
            matrices: a letter twice in one place, or in one place only.

        Example:
          >>> Equation.parse("BTD,NDH->BTNH").fold((8, 256, 32)).inputs
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

    def fold(self, shape: Iterable[int]) -> Fold:
        """How a weight of this shape becomes matrices.

        Raises:
          ValueError: the weight has another number of axes, no input or no output.
        """
        shape = tuple(shape)
        if len(shape) != len(self.w):
            raise ValueError(f"{self}: a weight {list(shape)} has not the axes {self.w!r}")
        inputs = [axis for axis, letter in enumerate(self.w) if letter not in self.y]
        batch = [
            axis for axis, letter in enumerate(self.w) if letter in self.x and letter in self.y
        ]
        return Fold(shape, tuple(inputs), tuple(batch))

    def expand(self, ndim: int) -> "Equation":
        """The same for inputs of `ndim` axes, without "..."."""
        if "..." not in self.x:
            return self
        free = [chr(n) for n in range(0x3B1, 0x3B1 + ndim)]  # Greek letters, which nobody used
        dots = "".join(free[: ndim - len(self.x) + 3])
        return Equation(self.x.replace("...", dots), self.w, self.y.replace("...", dots))

    def apply(self, x: Array, product: Product, fold: Fold) -> Array:
        """The einsum, by a product of matrices.

        Args:
          x: the input.
          product: what to do with `[*batch, rows, in]`.
          fold: that of the weight.

        Raises:
          ValueError: the input does not fit the equation or the weight.
        """
        this = self.expand(x.ndim)
        sizes = dict(zip(this.x, x.shape, strict=False))
        weight = dict(zip(this.w, fold.shape, strict=True))
        if len(this.x) != x.ndim or any(sizes[k] != weight[k] for k in sizes.keys() & weight):
            raise ValueError(f"{self}: the input is {list(x.shape)}, the weight {list(fold.shape)}")
        batch, inputs, outputs = (
            "".join(this.w[axis] for axis in axes)
            for axes in (fold.batch, fold.inputs, fold.outputs)
        )
        free = "".join(letter for letter in this.x if letter not in this.w)
        rows = x.transpose([this.x.index(letter) for letter in batch + free + inputs])
        y = product(rows.reshape(*fold.lead, -1, fold.matrix[1]))
        found = batch + free + outputs
        sizes |= weight
        y = y.reshape([sizes[letter] for letter in found])
        return y.transpose([found.index(letter) for letter in this.y])

    def spread(self, bias: Array, ndim: int, fold: Fold) -> Array:
        """A bias, by the weight's letters in the order of the result, to add to the result."""
        this = self.expand(ndim)
        weight = dict(zip(this.w, fold.shape, strict=True))
        return bias.reshape([weight.get(letter, 1) for letter in this.y])
