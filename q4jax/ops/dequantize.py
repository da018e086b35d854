"""`dequantize_4bit`, and the op `Dequantize`."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from q4jax.core.argument_names import name_ours
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec, float_dtype
from q4jax.core.state import QuantState, unpack_weight, weight_arrays
from q4jax.ops.registry import Implementation, check_name
from q4jax.ops.weight_op import WeightOp
from q4jax.ops.weight_sharding import WeightAxes, local_weight
from q4jax.sharding.axes import AxisLabels
from q4jax.sharding.op import Shard
from q4jax.sharding.partition import run

if TYPE_CHECKING:
    from q4jax.ops.params import Params4bit


@name_ours
def dequantize_4bit(
    packed: "Array | Params4bit",
    state: QuantState | None = None,
    dtype: Any = None,
    *,
    implementation: str | None = None,
) -> Array:
    """Decode a 4-bit weight: codebook times scale in float32, rounded once to `dtype`.

    Args:
      packed: uint8 codes as `quantize_4bit` returns them, or a `Params4bit` for both arguments.
      state: their state.
      dtype: float32, float16 or bfloat16; None takes `state.dtype`.
      implementation: None (best for the platform) or a name; see `matmul_4bit`.

    Returns:
      `[..., out, in]`: the shape of the weight, leading axes included.

    Raises:
      ValueError: codes that are not uint8, arrays that do not fit the state, another dtype.
      TypeError: state is missing; the result is differentiated.

    Examples:
      >>> import jax.numpy as jnp, q4jax
      >>> w = jnp.tile(jnp.array([1.0, -1.0]), 32)[None]
      >>> packed, state = q4jax.quantize_4bit(w)
      >>> bool((q4jax.dequantize_4bit(packed, state) == w).all())
      True
    """
    packed, state = unpack_weight(packed, state)
    dtype = state.dtype if dtype is None else float_dtype(dtype)
    return _dequantize(weight_arrays(packed, state), state.spec, dtype, check_name(implementation))


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "implementation"))
def _dequantize(
    arrays: WeightArrays, spec: QuantSpec, dtype: np.dtype, implementation: Implementation | None
) -> Array:
    def dequantize(arrays: WeightArrays) -> Array:
        return run(Dequantize(spec, implementation, dtype), arrays)[0]

    for _ in range(0 if arrays.offset is None else arrays.offset.ndim):
        dequantize = jax.vmap(dequantize)  # each matrix of a stack has statistics of its own
    return dequantize(arrays)


@dataclasses.dataclass(frozen=True)
class Dequantize(WeightOp):
    """Decoding: operands `(arrays,)`, result the weight in its full shape.

    Attributes:
      dtype: dtype of the result.
    """

    name, weight_operand = "dequantize", 0
    dtype: np.dtype[Any]

    def axes(self, arrays: WeightArrays) -> tuple[Any, tuple[AxisLabels, ...]]:
        """Label the weight's arrays and the weight."""
        weight = WeightAxes.from_arrays(self.spec, arrays)
        return (weight.arrays,), (weight.weight,)

    def profile(self, arrays: WeightArrays) -> tuple[np.dtype[Any], int | None]:
        """The result's dtype."""
        del arrays
        return self.dtype, None

    def compute(
        self, shard: Shard, implementation: Implementation, arrays: WeightArrays
    ) -> tuple[Array, ...]:
        """Decode this device's part."""
        arrays, spec = local_weight(shard, arrays, self.spec)
        return (implementation.dequantize(arrays, spec=spec, dtype=self.dtype),)
