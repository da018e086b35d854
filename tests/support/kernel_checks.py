"""Each case of the matrix compared with the independent model, whatever runs the kernel.

`call(op, *operands, **static)` runs an op of an implementation and returns its results.
"""

import jax.numpy as jnp
import numpy as np

from q4jax.core.spec import QuantSpec
from tests.support import oracle
from tests.support.kernel_matrix import DTYPES
from tests.support.products import assert_product
from tests.support.random_arrays import decoded, normal, random_weight


def weight_of(case):
    """A weight, and what it stands for in the case's dtype."""
    shape = (case.n, case.k)
    weight = random_weight(shape, case.blocksize, case.nested, case.quant_type, case.dtype)
    return weight, decoded(weight)


def check(case, call, roundings):
    """Compare: bits with bits, and products within their bound (`assert_product`)."""
    if case.operation == "quantize":
        _check_quantize(case, call)
    elif case.operation == "dequantize":
        _check_dequantize(case, call)
    elif case.operation == "linear":
        _check_linear(case, call, roundings)
    else:
        _check_linear_transpose(case, call, roundings)


def _check_quantize(case, call):
    w = normal(case.n, case.n, case.k, dtype=case.dtype)
    spec = QuantSpec.from_shape(w.shape, w.dtype, case.quant_type, case.blocksize, False)
    packed, absmax = call("quantize", w, spec=spec)
    assert (packed.dtype, packed.shape) == (jnp.uint8, spec.packed_shape)
    codes, scales = oracle.quantize(w, case.quant_type, case.blocksize)
    np.testing.assert_array_equal(np.ravel(packed), codes)
    np.testing.assert_array_equal(np.ravel(absmax), scales)


def _check_dequantize(case, call):
    weight, expected = weight_of(case)
    spec = weight.quant_state.spec
    found = call("dequantize", weight.arrays, spec=spec, dtype=spec.dtype)
    assert oracle.same_bits(found, expected)


def _check_linear(case, call, roundings):
    weight, expected = weight_of(case)
    x = normal(1, case.m, case.k, dtype=case.dtype)
    bias = normal(2, case.n).astype(DTYPES[case.n % 3]) if case.bias else None
    y = call("linear", x, weight.arrays, bias, spec=weight.quant_state.spec)
    assert y.dtype == x.dtype
    assert_product(y, x, expected, 0.0 if bias is None else bias, roundings)


def _check_linear_transpose(case, call, roundings):
    weight, expected = weight_of(case)
    g = normal(1, case.m, case.n, dtype=case.dtype)
    dx = call("linear_transpose", g, weight.arrays, spec=weight.quant_state.spec)
    assert dx.dtype == g.dtype
    assert_product(dx, g, expected.T, roundings=roundings)


def odd_input(dtype):
    """Blocks of 64: NaN, inf, zeros, subnormal and huge numbers, then a partial block."""
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal(64) for _ in range(12)]
    blocks[1][:] = 0
    blocks[2][5] = np.nan
    blocks[3][7] = -np.inf
    blocks[4] *= 1e-40  # subnormal in float32
    blocks[5] *= 2e38
    blocks[6] *= 1e-37
    blocks[7][:] = -0.0
    blocks[8][0] = np.nan
    blocks[8][1] = np.inf
    blocks[9] = np.sign(blocks[9])
    with np.errstate(all="ignore"):
        values = np.concatenate([*blocks, rng.standard_normal(11)]).astype(np.float32)
        return jnp.asarray(values).astype(dtype)
