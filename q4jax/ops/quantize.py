"""`quantize_4bit` and `dequantize_4bit`: the functional interface, as bitsandbytes has it."""

from typing import Any

from jax import Array

from q4jax.core.codebooks import QuantType
from q4jax.core.state import QuantState
from q4jax.ops.params import Params4bit, as_params4bit


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
      TypeError: w is not an array, or is quantized already.
      NotImplementedError: the named implementation cannot serve the call.

    Source: QLoRA, arXiv:2305.14314, sections 2 and 3; bitsandbytes' CPU backend for the rounding.

    Example:
      >>> import jax, q4jax
      >>> w = jax.random.normal(jax.random.key(0), (128, 256))
      >>> packed, state = q4jax.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
      >>> packed.shape, packed.dtype.name, state
      ((128, 128), 'uint8', QuantState(nf4_b64_n256_float32_128x256))
    """
    weight = Params4bit.quantize(
        w,
        blocksize,
        compress_statistics,
        quant_type,
        check_finite=check_finite,
        implementation=implementation,
    )
    return weight.packed, weight.quant_state


def dequantize_4bit(
    packed: Array | Params4bit,
    state: QuantState | None = None,
    dtype: Any = None,
    *,
    implementation: str | None = None,
) -> Array:
    """The weight back: codebook times scale in float32, rounded once to `dtype`.

    Args:
      packed: uint8 codes as `quantize_4bit` returns them, or a `Params4bit` for both arguments.
      state: their state.
      dtype: float32, float16 or bfloat16; None takes `state.dtype`.
      implementation: None (best for the platform) or a name; see `matmul_4bit`.

    Returns:
      `[..., out, in]`: the shape of the weight, leading axes included.

    Raises:
      ValueError: codes that are not uint8, arrays that do not fit the state, another dtype.
      TypeError: state is missing.

    Example:
      >>> import jax.numpy as jnp, q4jax
      >>> w = jnp.tile(jnp.array([1.0, -1.0]), 32)[None]
      >>> packed, state = q4jax.quantize_4bit(w)
      >>> bool((q4jax.dequantize_4bit(packed, state) == w).all())
      True
    """
    weight = as_params4bit(packed, state)
    return weight.dequantize(dtype, implementation=implementation)
