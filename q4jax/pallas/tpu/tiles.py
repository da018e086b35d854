"""The tiles of the kernels: how much of a weight a step of the grid decodes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from q4jax.pallas.tpu.registers import LANES

_STEP = 128  # what a step of the grid costs, in columns of K
_FEWEST_ROWS, _FEW_ROWS, _MOST_ROWS = 16, 128, 512


@dataclasses.dataclass(frozen=True)
class Tile:
    """The rows of the activation, and the part of the weight, of one step.

    Attributes:
      m: rows of the activation; a multiple of 16.
      n: output features, a multiple of 128.
      k: input features, a multiple of 128 and a power of two.
      columns: the output features that are decoded at once; divides n.
    """

    m: int
    n: int
    k: int
    columns: int


def choose(rows: int, n: int, k: int, dtype: np.dtype, *, transpose: bool) -> Tile:
    """Return the tile of a product with a weight of at least 128 x 128.

    The sizes are those of the fewest bundles in kernels compiled for v5e and v6e.

    Args:
      rows: of the activation.
      n: output features.
      k: input features.
      dtype: of the activation. A product in float32 is six of bfloat16, so its program is long.
      transpose: whether the sum is over output features.
    """
    m = min(-(-rows // 16) * 16, _MOST_ROWS)
    if dtype == jnp.float32 and m > _FEWEST_ROWS:
        m = min(m, 256)
        most_n, most_k, columns = 256, 1024, 256
    elif m <= _FEW_ROWS:
        most_n, most_k, columns = 512, 2048, 256
    elif transpose:
        most_n, most_k, columns = 1024, 2048, 512
    else:
        most_n, most_k, columns = 512, 4096, 256
    own = min(most_n, 1 << (n.bit_length() - 1))
    return Tile(m, own, _k_tile(k, most_k), min(own, columns))


def choose_unpacked(k: int, blocksize: int = 1) -> int:
    """Return the input features of a tile that is read or written in full, by 128 output features.

    Rows a few apart are read and written at once only where a row is one register wide.

    Args:
      k: input features.
      blocksize: a tile has whole blocks of it.
    """
    return max(_k_tile(k, 2048), blocksize)


def _k_tile(k: int, most: int) -> int:
    """The power of two, from 128 to `most`, with the least work beyond `k` and in steps."""
    fitting = [tile for tile in (most >> i for i in range(6)) if LANES <= tile <= k]
    return min(fitting, key=lambda tile: -(-k // tile) * (tile + _STEP))
