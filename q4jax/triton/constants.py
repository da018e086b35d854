"""The constants of a Triton kernel, fixed when it is compiled."""

import dataclasses
from typing import Any

import numpy as np

from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec
from q4jax.gpu import ptx_decode as decode
from q4jax.gpu import tiles
from q4jax.gpu.tiling import Tiling

# Triton holds the operands of a step in registers: beside a large sum, Ampere has none left for
# more columns than these.
_LARGE_SUM = 64 * 128
_LARGE_SUM_K = 64

# Triton 3.7 cannot compile for Blackwell a tile of this many columns, or fewer, of which one
# thread decodes whole rows.
_WHOLE_ROW = 64


@dataclasses.dataclass(frozen=True)
class KernelConstants:
    """The static argument of a kernel. The number of rows of the activation is not part of it.

    Attributes:
      tiling: the tiling of the weight.
      tile: the tile's sizes.
      steps: the tiles that a program walks over.
      masked_m: whether a tile may reach beyond the rows of the activation.
      masked_n: whether a tile may reach beyond the rows of the weight.
      masked_k: whether a tile may reach beyond the columns of the weight.
      dtype: the compute dtype's name.
      batched: the names of the operands that have one array for each element of a batch; all
        elements share the others.
      transpose: whether the kernel computes `g @ W` instead of `x @ W.T`.
    """

    tiling: Tiling
    tile: tiles.Tile
    steps: int
    masked_m: bool
    masked_n: bool
    masked_k: bool
    dtype: str
    batched: frozenset[str]
    transpose: bool

    @classmethod
    def from_problem(
        cls, m: int, spec: QuantSpec, dtype: Any, batched: frozenset[str], *, transpose: bool
    ) -> "KernelConstants":
        """Choose the constants of a product with M rows."""
        tile = tiles.choose(m, spec.shape, dtype, transpose=transpose)
        if not transpose and tile.m * tile.n > _LARGE_SUM:
            tile = dataclasses.replace(tile, k=min(tile.k, _LARGE_SUM_K))
        if not transpose and tile.k <= _WHOLE_ROW and tile.n >= 32 * tile.warps:
            tile = dataclasses.replace(tile, warps=tile.n // 16)
        n, k = spec.shape
        walked, step = (n, tile.n) if transpose else (k, tile.k)
        steps = -(-walked // (step * tile.splits))
        beyond = walked < step * steps * tile.splits
        return cls(
            tiling=Tiling(spec, tile.n, tile.k, False),
            tile=tile,
            steps=steps,
            masked_m=m < tile.m,
            masked_n=beyond if transpose else n < tile.n,
            masked_k=k % tile.k > 0 if transpose else beyond,
            dtype=np.dtype(dtype).name,
            batched=batched,
            transpose=transpose,
        )

    def programs(self, m: int, batch: int) -> int:
        """The number of programs of a launch."""
        n, k = self.tiling.shape
        across = -(-k // self.tile.k) if self.transpose else -(-n // self.tile.n)
        return batch * -(-m // self.tile.m) * across * self.tile.splits

    def stride(self, name: str) -> int:
        """Elements from one array of an operand to the batch's next; for activations, in a row."""
        n, k = self.tiling.shape
        blocks = n * k // self.tiling.spec.blocksize
        sizes = {
            "x": k,
            "g": n,
            "packed": n * k // 2,
            "absmax": blocks,
            "nested": -(-blocks // codebooks.NESTED_BLOCKSIZE),
            "offset": 1,
            "bias": n,
        }
        return sizes[name] if name in self.batched else 0

    @property
    def tables(self) -> int:
        """The number of tables of a block."""
        return decode.table_count(self.dtype)

    def table_word_asm(self, part: int, word: int) -> str:
        """Return the PTX of one word of a table."""
        return decode.table_word_asm(self.tiling.spec.quant_type, self.dtype, part, word)

    def pair_asm(self, byte: int) -> str:
        """Return the PTX of the weights of one byte of each word."""
        return decode.pair_asm(byte)
