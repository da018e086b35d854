"""Where a weight's arrays lie in a TPU's memory.

The kernels read codes and scales transposed, `[K / 2, N]`. The arrays keep their shapes, which are
bitsandbytes' order of the bytes; only their layout in memory puts N on the lanes, and then the
transpose costs nothing. Under the default layout XLA copies the codes before each call.
"""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec


def formats(arrays: Any, sharding: Any, spec: QuantSpec) -> WeightArrays:
    """Return the format of each array of a weight, for `jax.device_put` and `jax.jit`.

    Args:
      arrays: a `WeightArrays` of arrays or of anything with `ndim`; leading axes stay major.
      sharding: of all of them, or a `WeightArrays` of shardings.
      spec: of the weight.

    Returns:
      A `WeightArrays` of `Format`, with None where `arrays` has None.

    Raises:
      ValueError: the weight is not a matrix in rows of whole blocks.
    """
    if len(spec.shape) != 2 or not spec.in_rows:
        raise ValueError(f"the kernels read matrices in rows of whole blocks, not {spec.tag()}")
    if isinstance(sharding, Sharding):
        sharding = jax.tree.map(lambda _: sharding, arrays)

    def lanes_on_rows(array: Any, sharding: Any) -> Format:
        *lead, row, column = range(array.ndim)
        return Format(Layout(major_to_minor=(*lead, column, row)), sharding)

    def default(array: Any, sharding: Any) -> Format:
        return Format(Layout(major_to_minor=tuple(range(array.ndim))), sharding)

    matrices = jax.tree.map(lanes_on_rows, arrays[:2], sharding[:2])
    return WeightArrays(*matrices, *jax.tree.map(default, arrays[2:], sharding[2:]))
