"""What a kernel knows when it is compiled."""

import dataclasses
from typing import Any

import numpy as np

from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec
from q4jax.gpu import ptx_decode as decode
from q4jax.gpu import tiles
from q4jax.pallas.weight_tile import Tiling

# Triton holds the operands of a step in registers: beside a large sum, Ampere has none left for
# more columns than these.
_LARGE_SUM = 64 * 128
_LARGE_SUM_K = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """The one static argument of a kernel; rows of the activation are counted at run time.

    Attributes:
      tiling: of the weight.
      tile: sizes.
      steps: tiles that a program walks.
      masked_m, masked_n, masked_k: whether a tile may reach beyond an axis.
      dtype: the compute dtype's name.
      batched: names of the operands that have one array for each element of a batch; the others
        are shared by all.
    """

    tiling: Tiling
    tile: tiles.Tile
    steps: int
    masked_m: bool
    masked_n: bool
    masked_k: bool
    dtype: str
    batched: frozenset[str]

    @classmethod
    def of(
        cls, operation: str, m: int, spec: QuantSpec, dtype: Any, batched: frozenset[str]
    ) -> "Plan":
        """For "linear" or "transposed" with M rows."""
        tile = tiles.choose(operation, m, spec.shape, dtype)
        if operation == "linear" and tile.m * tile.n > _LARGE_SUM:
            tile = dataclasses.replace(tile, k=min(tile.k, _LARGE_SUM_K))
        n, k = spec.shape
        walked, step = (k, tile.k) if operation == "linear" else (n, tile.n)
        steps = -(-walked // (step * tile.splits))
        beyond = walked < step * steps * tile.splits
        return cls(
            tiling=Tiling(spec, tile.n, tile.k, False),
            tile=tile,
            steps=steps,
            masked_m=m < tile.m,
            masked_n=beyond if operation == "transposed" else n < tile.n,
            masked_k=beyond if operation == "linear" else k % tile.k > 0,
            dtype=np.dtype(dtype).name,
            batched=batched,
        )

    def programs(self, operation: str, m: int, batch: int) -> int:
        """How many of them the kernel is."""
        n, k = self.tiling.shape
        across = -(-n // self.tile.n) if operation == "linear" else -(-k // self.tile.k)
        return batch * -(-m // self.tile.m) * across * self.tile.splits

    def stride(self, name: str) -> int:
        """Elements from one array of an operand to the batch's next: of activations, a row's."""
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
        """That a block has."""
        return decode.table_count(self.dtype)

    def table_word_asm(self, part: int, word: int) -> str:
        """PTX of one word of a table."""
        return decode.table_word_asm(self.tiling.spec.quant_type, self.dtype, part, word)

    def pair_asm(self, byte: int) -> str:
        """PTX of the weights of one byte of each word."""
        return decode.pair_asm(byte)
