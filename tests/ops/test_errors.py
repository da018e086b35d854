"""Every refusal names the argument, its value and what is allowed, before any work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax import Params4bit

W = jnp.ones((4, 128))
X = jnp.ones((2, 128))
ALLOWED = "must be float32, float16 or bfloat16, got"


@pytest.fixture(scope="module")
def weight():
    return Params4bit.quantize(W, 64, True, "nf4")


def struct(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "int8"}, "quant_type must be 'nf4' or 'fp4', got 'int8'"),
        ({"quant_type": "NF4"}, "quant_type must be 'nf4' or 'fp4', got 'NF4'"),
        ({"quant_type": None}, "quant_type must be 'nf4' or 'fp4', got None"),
        ({"quant_type": ["nf4"]}, r"quant_type must be 'nf4' or 'fp4', got \['nf4'\]"),
        ({"blocksize": 100}, r"invalid blocksize 100; allowed: \[32, 64, 128"),
        ({"blocksize": 16}, "invalid blocksize 16"),
        ({"blocksize": 8192}, "invalid blocksize 8192"),
        ({"blocksize": 0}, "invalid blocksize 0"),
        ({"blocksize": -64}, "invalid blocksize -64"),
        ({"blocksize": True}, "invalid blocksize True"),
        ({"blocksize": 64.0}, r"invalid blocksize 64\.0"),
        ({"blocksize": "64"}, "invalid blocksize '64'"),
        ({"blocksize": None}, "invalid blocksize None"),
        ({"w": jnp.ones((4, 64), jnp.int32)}, f"w.dtype {ALLOWED} int32"),
        ({"w": jnp.ones((4, 64), jnp.uint8)}, f"w.dtype {ALLOWED} uint8"),
        ({"w": jnp.ones((4, 64), bool)}, f"w.dtype {ALLOWED} bool"),
        ({"w": jnp.ones((4, 64), jnp.complex64)}, f"w.dtype {ALLOWED} complex64"),
        ({"w": jnp.ones((4, 64), jnp.float8_e4m3fn)}, f"w.dtype {ALLOWED} float8_e4m3fn"),
        ({"w": np.ones((4, 64))}, f"w.dtype {ALLOWED} float64"),
        ({"w": jnp.float32(1)}, r"shape must have at least one axis and no empty one, got \(\)"),
        ({"w": jnp.ones((0, 64))}, r"shape must have .* got \(0, 64\)"),
        ({"w": jnp.ones((4, 0))}, r"shape must have .* got \(4, 0\)"),
        ({"w": jnp.ones((0, 4, 64))}, r"\(0, 4, 64\)"),
        ({"implementation": "cuda"}, "implementation must be None or one of 'xla', .*got 'cuda'"),
        ({"implementation": ""}, "implementation must be None or one of 'xla', .*got ''"),
    ],
)
def test_quantize(arguments, message):
    with pytest.raises(ValueError, match=message):
        q4jax.quantize_4bit(**({"w": W} | arguments))


@pytest.mark.parametrize("w", [[[1.0, 2.0]], 1.0, None, "w"])
def test_quantize_takes_arrays(w):
    with pytest.raises(TypeError, match=f"w must be an array, got {type(w).__name__}"):
        q4jax.quantize_4bit(w)


def test_quantizing_twice(weight):
    for quantized in (weight, weight.quant_state):
        with pytest.raises(TypeError, match="w is quantized already: .*nf4_b64_n256_float32_4x128"):
            q4jax.quantize_4bit(quantized)
    with pytest.raises(ValueError, match=f"w.dtype {ALLOWED} uint8"):
        q4jax.quantize_4bit(weight.packed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 128), (5, 9)])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_that_are_not_finite(bad, shape, nested):
    w = jnp.ones(shape).at[1, 2].set(bad)
    rows, columns = shape
    with pytest.raises(ValueError, match=rf"w holds NaN or inf .*1 of {w.size}.*{rows}, {columns}"):
        q4jax.quantize_4bit(w, 64, nested)
    packed, state = q4jax.quantize_4bit(w, 64, False, check_finite=False)
    dense = np.asarray(q4jax.dequantize_4bit(packed, state)).ravel()
    block = np.arange(w.size) // 64 == (columns + 2) // 64
    assert not np.isfinite(dense[block]).any()  # NaN; where there was an inf, NaN or inf
    assert (dense[~block] == 1).all()
    traced, traced_state = jax.jit(lambda w: q4jax.quantize_4bit(w, 64, False))(w)
    np.testing.assert_array_equal(traced, packed)
    np.testing.assert_array_equal(traced_state.absmax, state.absmax)


NOT_HERE = ["triton", "mosaic_gpu"]


@pytest.mark.parametrize("name", NOT_HERE)
def test_an_implementation_that_is_not_installed(weight, name):
    for call in (
        lambda: q4jax.quantize_4bit(W, implementation=name),
        lambda: q4jax.dequantize_4bit(weight, implementation=name),
        lambda: q4jax.matmul_4bit(X, weight, implementation=name),
    ):
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' .* 'xla'"):
            call()


def test_named_implementation(weight):
    named = q4jax.matmul_4bit(X, weight, implementation="xla")
    np.testing.assert_allclose(named, q4jax.matmul_4bit(X, weight), rtol=1e-5, atol=1e-5)


FUNCTIONS = {
    "dequantize": lambda *pair: q4jax.dequantize_4bit(*pair),
    "matmul": lambda *pair: q4jax.matmul_4bit(X, *pair),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_codes_that_are_not_codes(weight, function):
    call, state = FUNCTIONS[function], weight.quant_state
    expected = r"packed must be uint8\[4, 64\] for nf4_b64_n256_float32_4x128, got "
    for packed, found in [
        (weight.packed.astype(jnp.bfloat16), r"bfloat16\[4, 64\]"),
        (weight.packed.astype(jnp.int8), r"int8\[4, 64\]"),
        (weight.packed.T, r"uint8\[64, 4\]"),
        (weight.packed[:2], r"uint8\[2, 64\]"),
        (weight.packed.ravel(), r"uint8\[256\]"),
    ]:
        with pytest.raises(ValueError, match=expected + found):
            call(packed, state)
        with pytest.raises(ValueError, match=expected + found):
            call(Params4bit(packed, state))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_missing_state(weight, function):
    call = FUNCTIONS[function]
    with pytest.raises(TypeError, match="state must be a QuantState .*got None"):
        call(weight.packed)
    with pytest.raises(TypeError, match="state must be a QuantState .*got 'nf4'"):
        call(weight.packed, "nf4")
    with pytest.raises(TypeError, match="state must be a QuantState .*got ArrayImpl$"):
        call(weight.packed, weight.packed)
    with pytest.raises(TypeError, match="state must not be given with a Params4bit"):
        call(weight, weight.quant_state)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("packed", [None, [[1, 2]], 3])
def test_codes_that_are_no_array(weight, function, packed):
    with pytest.raises((TypeError, ValueError), match="packed must be"):
        FUNCTIONS[function](packed, weight.quant_state)


@pytest.mark.parametrize("dtype", ["float64", "int8", jnp.uint8, "nonsense", complex])
def test_dequantize_dtype(weight, dtype):
    with pytest.raises(ValueError, match=f"dtype {ALLOWED}"):
        q4jax.dequantize_4bit(weight, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 64)), r"x must be \[..., 128\] for a weight of \[4, 128\], got \[2, 64\]"),
        (jnp.ones((128, 2)), r"x must be \[..., 128\] .* got \[128, 2\]"),
        (jnp.float32(1), r"x must be \[..., 128\] .* got \[\]"),
        (jnp.ones((2, 128), jnp.int32), f"x.dtype {ALLOWED} int32"),
        (np.ones((2, 128)), f"x.dtype {ALLOWED} float64"),
        (jnp.ones((2, 128), jnp.complex64), f"x.dtype {ALLOWED} complex64"),
        ([[1.0] * 128], f"x.dtype {ALLOWED} .*list"),
        (None, f"x.dtype {ALLOWED} .*None"),
    ],
)
def test_matmul_x(weight, x, message):
    with pytest.raises(ValueError, match=message):
        q4jax.matmul_4bit(x, weight)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (jnp.ones(128), r"bias must be \[4\] for a weight of \[4, 128\], got .128"),
        (jnp.ones((1, 4)), r"bias must be \[4\] .* got .1, 4"),
        (jnp.float32(1), r"bias must be \[4\] .* got"),
        (jnp.ones(4, jnp.int32), f"bias.dtype {ALLOWED} int32"),
        (np.ones(4), f"bias.dtype {ALLOWED} float64"),
        ([1.0] * 4, f"bias.dtype {ALLOWED} .*list"),
    ],
)
def test_matmul_bias(weight, bias, message):
    with pytest.raises(ValueError, match=message):
        q4jax.matmul_4bit(X, weight, bias=bias)


@pytest.mark.parametrize("shape", [(128,), (3, 4, 128), (3, 5, 9)])
def test_matmul_of_a_weight_that_is_no_matrix(shape):
    weight = Params4bit.quantize(jnp.ones(shape))
    with pytest.raises(ValueError, match=r"quant_state.shape must be 2D \[N, K\], got \["):
        q4jax.matmul_4bit(jnp.ones((2, shape[-1])), weight)


@pytest.mark.parametrize("codes", [np.zeros(255, np.uint8), np.zeros(1024, np.uint8)])
def test_from_prequantized_size(weight, codes):
    stats = weight.quant_state.as_dict()
    with pytest.raises(ValueError, match=f"data must hold 256 bytes for nf4_.*, got {codes.size}"):
        Params4bit.from_prequantized(codes, stats)


def test_swapped_arguments_of_matmul():
    weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)))
    with pytest.raises(TypeError, match="x is the weight, .*; swap the two"):
        q4jax.matmul_4bit(weight, jnp.ones((1, 64)))
