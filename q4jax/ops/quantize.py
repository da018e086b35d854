"""`quantize_4bit`, and the ops `Quantize` and `DoubleQuantize`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core.argument_names import name_ours
from q4jax.core.blockwise import WeightArrays
from q4jax.core.codebooks import QuantType
from q4jax.core.spec import QuantSpec, float_dtype
from q4jax.core.state import QuantState
from q4jax.ops.registry import Implementation, check_name
from q4jax.ops.weight_op import WeightOp
from q4jax.ops.weight_sharding import WeightAxes
from q4jax.sharding.axes import REPLICATED, AxisLabels
from q4jax.sharding.op import Shard
from q4jax.sharding.partition import run


@name_ours
def quantize_4bit(
    w: Array,
    blocksize: int = 64,
    compress_statistics: bool = False,
    quant_type: QuantType = "fp4",
    *,
    check_finite: bool = True,
    implementation: str | None = None,
) -> tuple[Array, QuantState]:
    """Quantize a weight blockwise to 4 bits; bytes and scales are bitsandbytes', bit for bit.

    Blocks of `blocksize` elements run along the last axis, row-major. Each is scaled by its
    largest magnitude and every element becomes the nearest entry of a 16-entry codebook.

    Args:
      w: `[..., out, in]` (or `[in]`), float32, float16 or bfloat16. Where `in % blocksize` is not
        0, blocks cross rows and the results are flat.
      blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
      compress_statistics: double quantization: the scales become 8-bit codes, with one float32
        for each 256 of them and one offset.
      quant_type: "nf4" (codebook for normally distributed weights) or "fp4" (1-2-1 float).
      check_finite: raise where a concrete `w` holds NaN or inf. Unchecked, and under a trace, the
        scale of a block that holds one is NaN or inf, and the block decodes accordingly.
      implementation: None (best for the platform) or a name; see `matmul_4bit`.

    Returns:
      packed: uint8 `[..., out, in/2]`, the element of even index in the high nibble; flat form
        `[(n+1)//2]`.
      state: the scales (float32 `[..., out, in/blocksize]`; uint8 codes of them where compressed)
        and the static description.

    Raises:
      ValueError: quant_type, blocksize, the dtype or the shape is not allowed; w is not finite.
      TypeError: w is not an array, or is quantized already; the result is differentiated.
      NotImplementedError: the named implementation cannot serve the call.

    Source: QLoRA, arXiv:2305.14314, sections 2 and 3; bitsandbytes' CPU backend for the rounding.

    Examples:
      >>> import jax, q4jax
      >>> w = jax.random.normal(jax.random.key(0), (128, 256))
      >>> packed, state = q4jax.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
      >>> packed.shape, packed.dtype.name, state
      ((128, 128), 'uint8', QuantState(nf4_b64_n256_float32_128x256))
    """
    if isinstance(w, QuantState) or hasattr(w, "quant_state"):
        raise TypeError(f"w is quantized already: {w!r}")
    if not hasattr(w, "dtype") or not hasattr(w, "shape"):
        raise TypeError(f"w must be an array, got {type(w).__name__}")
    # Before jnp.asarray, which would turn float64 into float32 in silence.
    dtype = float_dtype(w.dtype, "w.dtype")
    spec = QuantSpec.from_shape(w.shape, dtype, quant_type, blocksize, bool(compress_statistics))
    arrays, finite = _quantize(w, spec, check_name(implementation))
    if check_finite and not isinstance(finite, jax.core.Tracer) and not finite:
        require_finite(w, "w")
    state = QuantState(arrays.absmax, arrays.nested_absmax, arrays.offset, spec)
    return arrays.packed, state


def require_finite(w: Array, name: str) -> None:
    """Raise ValueError, with the tensor's name, where a concrete `w` holds NaN or inf."""
    if isinstance(w, jax.core.Tracer):
        return
    count = int((~jnp.isfinite(jnp.asarray(w))).sum())
    if count:
        raise ValueError(
            f"{name} holds NaN or inf ({count} of {w.size} elements of {w.dtype}{list(w.shape)}); "
            f"check_finite=False quantizes it anyhow"
        )


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def _quantize(
    w: Array, spec: QuantSpec, implementation: Implementation | None
) -> tuple[WeightArrays, Array]:
    """Return the arrays, and whether w is finite."""
    packed, absmax = run(Quantize(spec, implementation), w)
    finite = jnp.isfinite(absmax).all()
    if not spec.nested:
        return WeightArrays(packed, absmax, None, None), finite
    return WeightArrays(packed, *run(DoubleQuantize(spec, implementation), absmax)), finite


@dataclasses.dataclass(frozen=True)
class Quantize(WeightOp):
    """Blockwise quantization: operands `(w,)`, results the codes and the plain scales."""

    name = "quantize"

    def axes(self, w: Array) -> tuple[Any, tuple[AxisLabels, ...]]:
        """Label the weight, its codes and its scales."""
        weight = WeightAxes.from_spec(self.spec, w.ndim - len(self.spec.shape), nested=False)
        return (weight.weight,), (weight.packed, weight.absmax)

    def profile(self, w: Array) -> tuple[np.dtype[Any], int | None]:
        """The weight's dtype."""
        return w.dtype, None

    def compute(self, shard: Shard, implementation: Implementation, w: Array) -> tuple[Array, ...]:
        """Quantize this device's blocks."""
        del shard
        local = dataclasses.replace(self.spec, shape=w.shape[w.ndim - len(self.spec.shape) :])
        return tuple(implementation.quantize(w, spec=local))


@dataclasses.dataclass(frozen=True)
class DoubleQuantize(WeightOp):
    """Quantization of the scales: operands `(absmax,)`, results `(codes, nested_absmax, offset)`.

    The offset is the mean of all scales, so each device gathers them and keeps its part.
    """

    name, gathers_operands = "double_quantize", True

    def axes(self, absmax: Array) -> tuple[Any, tuple[AxisLabels, ...]]:
        """Label the scales, their codes and the statistics."""
        lead = absmax.ndim - len(self.spec.absmax_shape)
        scales = WeightAxes.from_spec(self.spec, lead, nested=True).absmax
        return (scales,), (scales, (REPLICATED,), ())

    def profile(self, absmax: Array) -> tuple[np.dtype[Any], int | None]:
        """The scales' dtype."""
        return absmax.dtype, None

    def compute(
        self, shard: Shard, implementation: Implementation, absmax: Array
    ) -> tuple[Array, ...]:
        """Quantize all scales and keep this device's codes."""
        codes, nested_absmax, offset = implementation.double_quantize(absmax)
        _, (labels, *_) = self.axes(absmax)
        for number, axis in enumerate(labels):
            size = codes.shape[number] // shard.parts(axis.label)
            first = shard.first_index(axis.label, size)
            codes = lax.dynamic_slice_in_dim(codes, first, size, number)
        return codes, nested_absmax, offset
