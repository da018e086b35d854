"""`QuantSpec`, the static description of a 4-bit weight."""

import dataclasses
import math
import operator
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from q4jax.core.codebooks import BLOCKSIZES, NESTED_BLOCKSIZE, check_quant_type

FLOAT_DTYPES = tuple(np.dtype(d) for d in (jnp.float32, jnp.float16, jnp.bfloat16))

_NUMBER = "[1-9][0-9]*"
_TAG = re.compile(
    rf"([a-z0-9]+)_b({_NUMBER})_n(0|{_NUMBER})_([a-z0-9]+)_({_NUMBER}(?:x{_NUMBER})*)"
)


def float_dtype(value: Any, name: str = "dtype") -> np.dtype[Any]:
    """Return `value` as float32, float16 or bfloat16; ValueError names the argument otherwise."""
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # the last of texts such as ","
        dtype = None
    if dtype is None or dtype not in FLOAT_DTYPES:
        shown = value if dtype is None else dtype.name
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {shown}")
    return dtype


def check_blocksize(value: Any) -> None:
    """Raise ValueError unless `value` is one of the block sizes."""
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not integer or value not in BLOCKSIZES:
        raise ValueError(f"invalid blocksize {value!r}; allowed: {list(BLOCKSIZES)}")


# Positions in an array are int32, unless jax_enable_x64 is set.
_LARGEST_AXIS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The static description of a 4-bit weight; frozen and hashable.

    It is the treedef's static part of `QuantState`, the suffix in its key names, the metadata of
    the Variables a layer holds, and what errors print.

    Attributes:
      quant_type: "nf4" or "fp4".
      blocksize: elements that share one scale; a power of two from 32 to 4096.
      nested_blocksize: 256 where the scales are themselves quantized to 8 bits, 0 where plain.
      dtype: dtype of the weight that was quantized: float32, float16 or bfloat16.
      shape: in the row form (`shape[-1] % blocksize == 0`) the matrix shape, at most two axes;
        in the flat form the full shape of the weight.

    Examples:
      >>> from q4jax import QuantSpec
      >>> spec = QuantSpec("nf4", 64, 256, "float32", (128, 256))
      >>> spec.tag()
      'nf4_b64_n256_float32_128x256'
      >>> QuantSpec.parse(spec.tag()) == spec
      True
    """

    __module__ = "q4jax"

    quant_type: str
    blocksize: int
    nested_blocksize: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __post_init__(self):
        check_quant_type(self.quant_type)
        check_blocksize(self.blocksize)
        if self.nested_blocksize not in (0, NESTED_BLOCKSIZE):
            raise ValueError(
                f"nested_blocksize must be 0 (plain) or {NESTED_BLOCKSIZE}, "
                f"got {self.nested_blocksize!r}"
            )
        object.__setattr__(self, "blocksize", int(self.blocksize))
        object.__setattr__(self, "dtype", float_dtype(self.dtype))
        try:
            shape = tuple(operator.index(n) for n in self.shape)
        except TypeError:
            raise ValueError(f"shape must be integers, got {self.shape!r}") from None
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must have at least one axis and no empty one, got {shape}")
        if len(shape) > 2 and shape[-1] % self.blocksize == 0:
            raise ValueError(
                f"shape must be the matrix shape, two axes, where the last axis is a multiple of "
                f"blocksize {self.blocksize}; got {shape}"
            )
        object.__setattr__(self, "shape", shape)
        if not self.in_rows and self.packed_shape[0] > _LARGEST_AXIS:
            raise ValueError(
                f"shape {shape} has {math.prod(shape)} elements in one axis of codes, where rows "
                f"are not whole blocks of {self.blocksize}; at most {2 * _LARGEST_AXIS} are served"
            )

    @classmethod
    def from_shape(
        cls, shape: tuple[int, ...], dtype: Any, quant_type: str, blocksize: int, nested: bool
    ) -> "QuantSpec":
        """Return the spec of a weight with this full `shape`; the row form drops leading axes."""
        if 0 in shape:
            raise ValueError(f"shape must have no empty axis, got {tuple(shape)}")
        in_rows = blocksize in BLOCKSIZES and len(shape) > 0 and shape[-1] % blocksize == 0
        nested_blocksize = NESTED_BLOCKSIZE if nested else 0
        return cls(quant_type, blocksize, nested_blocksize, dtype, shape[-2:] if in_rows else shape)

    @property
    def nested(self) -> bool:
        """Whether the scales are double-quantized."""
        return self.nested_blocksize != 0

    @property
    def in_rows(self) -> bool:
        """Whether blocks end where rows end, so that arrays keep the row axis."""
        return self.shape[-1] % self.blocksize == 0

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the codes of one weight of this shape, without leading axes."""
        if self.in_rows:
            return (*self.shape[:-1], self.shape[-1] // 2)
        return ((math.prod(self.shape) + 1) // 2,)

    @property
    def absmax_shape(self) -> tuple[int, ...]:
        """Shape of the scales of one weight of this shape, without leading axes."""
        if self.in_rows:
            return (*self.shape[:-1], self.shape[-1] // self.blocksize)
        return (-(-math.prod(self.shape) // self.blocksize),)

    def tag(self) -> str:
        """Return an identifier that holds every field, such as `nf4_b64_n256_float32_128x256`.

        Errors and `repr` print it, and names of arrays in checkpoints end with it. Its parts, with
        underscores between them, are the fields in their order:

        - `nf4`: `quant_type`.
        - `b64`: `blocksize`, 64 elements to a scale.
        - `n256`: `nested_blocksize`, 256 scales to a nested scale; `n0` where the scales are plain.
        - `float32`: `dtype`, that of the weight before it was quantized. It is not the dtype of the
          codes (uint8), nor that of the computation.
        - `128x256`: `shape`, with an x between its axes. In the row form the axes before the
          matrix, such as those of a stack, are in the arrays only.

        Returns:
          A text that `QuantSpec.parse` reads.

        Examples:
          >>> from q4jax import QuantSpec
          >>> QuantSpec("fp4", 128, 0, "bfloat16", (5,)).tag()
          'fp4_b128_n0_bfloat16_5'
        """
        shape = "x".join(map(str, self.shape))
        numbers = f"b{self.blocksize}_n{self.nested_blocksize}"
        return f"{self.quant_type}_{numbers}_{self.dtype.name}_{shape}"

    @classmethod
    def parse(cls, tag: str) -> "QuantSpec":
        """Invert `tag`; ValueError for a text that `tag` does not write."""
        match = _TAG.fullmatch(tag)
        if match is None:
            raise ValueError(f"not the tag of a QuantSpec: {tag!r}")
        quant_type, blocksize, nested, dtype, shape = match.groups()
        dims = tuple(int(n) for n in shape.split("x"))
        return cls(quant_type, int(blocksize), int(nested), float_dtype(dtype), dims)

    def __repr__(self) -> str:
        return f"QuantSpec({self.tag()})"
