"""`quantize_4bit` and `dequantize_4bit` against an independent numpy implementation."""

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import q4jax
from q4jax import Params4bit, QuantSpec
from q4jax.core import blockwise
from q4jax.xla.quantize import quantize_rows
from tests.support import oracle
from tests.support.random_arrays import normal
from tests.support.vectors import DYNAMIC_MAP

EDGES = [0.0, -0.0, 1.0, -1.0, 2.0**126, -(2.0**127), 3e38, 1.1754944e-38, 1e-40, -1e-45]
MIDPOINTS = [float(m) for t in ("nf4", "fp4") for m in oracle.midpoints(np.sort(oracle.CODE[t]))]
FLOATS = st.one_of(
    st.floats(-2, 2, width=16),
    st.sampled_from(EDGES + MIDPOINTS),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def assert_same(found, expected):
    assert oracle.same_bits(found, expected), (np.asarray(found), np.asarray(expected))


def check_against_oracle(w, quant_type, blocksize, dtype):
    w = w.astype(oracle.DTYPES[dtype])
    packed, state = q4jax.quantize_4bit(jnp.asarray(w), blocksize, quant_type=quant_type)
    expected, absmax = oracle.quantize(w, quant_type, blocksize)
    assert_same(np.ravel(packed), expected)
    assert_same(np.ravel(state.absmax), absmax)
    dense = oracle.dequantize(packed, absmax, quant_type, blocksize, w.shape, dtype)
    assert_same(q4jax.dequantize_4bit(packed, state), dense)


# Shapes are few, since each costs a compilation; values are many.
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 64), (97,)])
def test_any_values(shape, quant_type):
    @given(arrays.arrays(np.float32, shape, elements=FLOATS, fill=FLOATS))
    def check(w):
        check_against_oracle(w, quant_type, 32, "float32")

    check()


@pytest.mark.parametrize(
    ("shape", "blocksize", "dtype"),
    [
        ((128,), 64, "float32"),
        ((1,), 4096, "float32"),
        ((7,), 32, "float16"),
        ((5, 7), 32, "bfloat16"),
        ((63, 3), 64, "float32"),  # one element short of whole blocks
        ((129, 128), 128, "float32"),  # rows that do not fill the last tile
        ((300, 64), 64, "bfloat16"),
        ((2, 3, 64), 32, "float16"),
        ((2, 3, 5, 9), 64, "float32"),
        ((3, 512), 512, "float16"),
        ((2, 4096), 2048, "float32"),
        ((1, 4096), 4096, "bfloat16"),
        ((2, 256), 256, "float32"),
        ((3, 1024), 1024, "float32"),
    ],
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_shapes(shape, blocksize, dtype, quant_type, rng):
    check_against_oracle(rng.normal(size=shape), quant_type, blocksize, dtype)


def test_a_partial_block_is_divided():
    """Where a product with the reciprocal gives another code."""
    rng = np.random.default_rng(0)
    midpoints = oracle.midpoints(oracle.NF4)
    scale = rng.uniform(0.5, 2, 100_000).astype(np.float32)
    x = (midpoints[rng.integers(15, size=scale.size)] * scale).astype(np.float32)
    divided, multiplied = (
        (midpoints < y[:, None]).sum(1) for y in (x / scale, x * (np.float32(1) / scale))
    )
    (differ,) = np.nonzero(divided != multiplied)
    assert differ.size > 100
    for i in differ[:50]:
        w = jnp.array([scale[i], x[i], 0.0])
        packed, _ = q4jax.quantize_4bit(w, 64, quant_type="nf4")
        assert packed[0] & 15 == divided[i]
        full, _ = q4jax.quantize_4bit(jnp.pad(w, (0, 61)), 64, quant_type="nf4")
        assert full[0] & 15 == multiplied[i]


@pytest.mark.parametrize("shape", [(300, 64), (45, 64), (3, 7), (1, 64), (64, 64), (3, 40, 64)])
def test_double_quantization(shape, rng):
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    _, plain = q4jax.quantize_4bit(w, 64, False, "nf4")
    packed, state = q4jax.quantize_4bit(w, 64, True, "nf4")
    absmax, offset = np.asarray(plain.absmax), np.asarray(state.offset)
    np.testing.assert_allclose(offset, absmax.astype(np.float64).mean(), rtol=4 * 2**-24)
    codes, nested_absmax = oracle.quantize_scales(absmax, offset, DYNAMIC_MAP)
    assert_same(np.ravel(state.absmax), codes)
    assert_same(state.nested_absmax, nested_absmax)
    scales = oracle.decode_scales(codes, nested_absmax, offset, DYNAMIC_MAP)
    dense = oracle.dequantize(packed, scales, "nf4", 64, shape, "float32")
    assert_same(q4jax.dequantize_4bit(packed, state), dense)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dequantize_rounds_once(dtype, rng):
    w = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    packed, state = q4jax.quantize_4bit(w, quant_type="nf4")
    expected = oracle.dequantize(packed, state.absmax, "nf4", 64, w.shape, dtype)
    assert_same(q4jax.dequantize_4bit(packed, state, dtype=dtype), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [1, 127, 129, 300])
def test_tiles_of_rows_are_the_reference(n, quant_type, rng):
    w = rng.normal(size=(n, 128)).astype(np.float32)
    specials = [np.nan, np.inf, -np.inf, 3e38, 2.0**126, 2.0**126 * 1.001, 1e-40, -1e-40]
    for i in range(0, n * 128 - 64, 320):
        w.ravel()[i] = specials[i // 320 % len(specials)]
    w.ravel()[64:128] = 0 if n > 1 else -0.0
    w.ravel()[0:32] *= 1e-40  # blocks of subnormals
    spec = QuantSpec.from_shape(w.shape, "float32", quant_type, 32, False)
    rows = jax.jit(lambda w: quantize_rows(w, quant_type=quant_type, blocksize=32))(w)
    flat = jax.jit(lambda w: blockwise.quantize_flat(w, spec))(w)
    for a, b in zip(rows, flat, strict=True):
        assert_same(np.ravel(a), np.asarray(b))
    packed, absmax = oracle.quantize(w, quant_type, 32)
    assert_same(np.asarray(flat[0]), packed)
    assert_same(np.asarray(flat[1]), absmax)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (5, 9)])
def test_eager_jit_and_vmap_agree(shape, nested, rng):
    w = jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)
    options = {"compress_statistics": nested, "quant_type": "nf4"}

    def quantize(w):
        return Params4bit.quantize(w, **options)

    stacked = jax.vmap(quantize)(w)
    dense = jax.vmap(Params4bit.dequantize)(stacked)
    for i in range(3):
        eager = quantize(w[i])
        for other in (jax.jit(quantize)(w[i]), jax.tree.map(lambda a, i=i: a[i], stacked)):
            assert jax.tree.structure(eager) == jax.tree.structure(other)
            jax.tree.map(assert_same, eager, other)
        assert_same(eager.dequantize(), dense[i])
        assert_same(eager.dequantize(), jax.jit(Params4bit.dequantize)(eager))


# bitsandbytes' own limits on N(0, 1) at 1024x1024: (mean, sigma) of the mean error, relative error.
ERRORS = {
    ("fp4", 32): (0.088925, 0.000091, 0.242443),
    ("fp4", 64): (0.096543, 0.000111, 0.260125),
    ("fp4", 1024): (0.119333, 0.000320, 0.315000),
    ("nf4", 32): (0.067746, 0.000069, 0.189726),
    ("nf4", 64): (0.072798, 0.000074, 0.203339),
    ("nf4", 128): (0.076831, 0.000091, 0.215237),
    ("nf4", 4096): (0.092547, 0.000360, 0.262473),
}


@pytest.mark.parametrize(("quant_type", "blocksize"), ERRORS)
def test_mean_error(quant_type, blocksize, rng):
    mean, sigma, relative = ERRORS[quant_type, blocksize]
    w = jnp.asarray(rng.normal(size=(1024, 1024)), jnp.float32)
    packed, state = q4jax.quantize_4bit(w, blocksize, quant_type=quant_type)
    error = jnp.abs(w - q4jax.dequantize_4bit(packed, state))
    assert abs(float(error.mean()) - mean) <= 7 * sigma
    assert float((error / (jnp.abs(w) + 1e-8)).mean()) <= relative * 1.01


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_table_of_plus_and_minus_one_is_lossless(quant_type, rng):
    w = jnp.asarray(rng.choice([-1.0, 1.0], size=(16, 64)), jnp.float32)
    packed, state = q4jax.quantize_4bit(w, quant_type=quant_type)
    assert_same(q4jax.dequantize_4bit(packed, state), w)


def test_defaults_are_bitsandbytes():
    _, state = q4jax.quantize_4bit(jnp.ones((2, 64)))
    assert (state.quant_type, state.blocksize, state.nested) == ("fp4", 64, False)


def test_a_numpy_weight_is_fine(rng):
    w = rng.normal(size=(2, 64)).astype(np.float32)
    ours, theirs = Params4bit.quantize(w), Params4bit.quantize(jnp.asarray(w))
    jax.tree.map(assert_same, ours, theirs)


@pytest.mark.parametrize("op", ["quantize", "dequantize"])
@pytest.mark.parametrize("differentiate", [jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacfwd])
def test_a_derivative_is_refused_by_the_name_of_the_op(op, differentiate):
    w = normal(0, 4, 64)
    packed, state = q4jax.quantize_4bit(w)
    functions = {
        "quantize": (lambda w: q4jax.quantize_4bit(w)[1].absmax.sum(), w),
        "dequantize": (lambda state: q4jax.dequantize_4bit(packed, state).sum(), state),
    }
    function, argument = functions[op]
    with pytest.raises(TypeError, match=f"^{op} of a 4-bit weight has no derivative"):
        differentiate(function)(argument)


def test_what_is_not_differentiated_may_be_quantized():
    def f(w):
        return w.sum() + q4jax.Params4bit.quantize(jax.lax.stop_gradient(w)).dequantize().sum()

    w = normal(0, 4, 64)
    np.testing.assert_array_equal(jax.grad(f)(w), jnp.ones_like(w))
