"""Arrays from numpy's generator, which compiles nothing, unlike jax.random: a program a shape."""

import jax.numpy as jnp
import numpy as np

from q4jax import Params4bit, QuantSpec, QuantState, codebooks
from tests.support import oracle


def normal(seed, *shape, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values.astype(jnp.dtype(dtype)))


def random_weight(shape, blocksize=64, nested=True, quant_type="nf4", dtype="float32", seed=0):
    """A weight with any codes and any scales that are not negative."""
    rng = np.random.default_rng(shape[0] + blocksize + 1_000_000 * seed)
    spec = QuantSpec.from_shape(shape, dtype, quant_type, blocksize, nested)
    packed = rng.integers(0, 256, spec.packed_shape, np.uint8)
    if nested:
        codes = rng.integers(0, 256, spec.absmax_shape, np.uint8)
        arrays = (codes, rng.random(-(-codes.size // 256), np.float32), 1 + rng.random((), "f4"))
    else:
        arrays = (rng.random(spec.absmax_shape, np.float32), None, None)
    on_device = [None if a is None else jnp.asarray(a) for a in arrays]
    return Params4bit(jnp.asarray(packed), QuantState(*on_device, spec))


def decoded(weight, dtype=None):
    """What it stands for, as numpy has it."""
    packed, absmax, *nested = (None if a is None else np.asarray(a) for a in weight.arrays)
    spec = weight.quant_state.spec
    if spec.nested:
        absmax = oracle.decode_scales(absmax, *nested, codebooks.DYNAMIC_MAP)
    dtype = jnp.dtype(dtype or spec.dtype).name
    return oracle.dequantize(packed, absmax, spec.quant_type, spec.blocksize, spec.shape, dtype)
