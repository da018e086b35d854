"""`matmul_4bit` and its gradients, against numpy in float64 on the weight as it is rounded."""

import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import q4jax
from q4jax import Params4bit
from q4jax.ops import registry
from tests.support.random_arrays import normal

DTYPES = ["float32", "bfloat16", "float16"]
# (shape, blocksize): rows of blocks, more than one tile, then blocks that cross rows.
LAYOUTS = [((96, 128), 64), ((1040, 64), 32), ((40, 72), 64), ((301, 31), 32), ((5, 64), 128)]


def quantize(shape, blocksize=64, nested=True, quant_type="nf4"):
    return Params4bit.quantize(normal(0, *shape), blocksize, nested, quant_type)


def f64(array):
    return np.asarray(array).astype(np.float64)


def assert_product(found, a, b, extra=0.0):
    """`a @ b.T + extra`, as a sum of K products in float32 and one rounding allow.

    A float32 sum of K exact products in any order is off by at most K eps sum |a||b|, with eps
    2^-24; rounding it adds half a unit in the last place of the result's dtype (plus, for
    float16, half its smallest subnormal number).
    """
    exact = f64(a) @ f64(b).T + f64(extra)
    terms = np.abs(f64(a)) @ np.abs(f64(b)).T + np.abs(f64(extra))
    summed = (a.shape[-1] + 2) * 2.0**-24 * terms
    info = jnp.finfo(found.dtype)
    rounded = float(info.eps) / 2 * (np.abs(exact) + summed)
    bound = summed + rounded + float(info.smallest_subnormal)
    assert found.shape == exact.shape
    assert (np.abs(f64(found) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocksize"), LAYOUTS)
def test_forward_and_gradients(shape, blocksize, dtype):
    weight = quantize(shape, blocksize)
    n, k = shape
    x, g, bias = normal(1, 16, k, dtype=dtype), normal(2, 16, n, dtype=dtype), normal(3, n)
    y, vjp = jax.vjp(lambda x, bias: q4jax.matmul_4bit(x, weight, bias=bias), x, bias)
    dx, dbias = vjp(g)
    assert (y.dtype, dx.dtype, dbias.dtype) == (x.dtype, x.dtype, bias.dtype)
    w = weight.dequantize(dtype)
    assert_product(y, x, w, bias)
    assert_product(dx, g, w.T)
    assert_product(dbias[None], jnp.ones((1, 16), dtype), g.T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (65,), (2, 3), (2, 0, 3), (513,)])
def test_leading_axes_of_x(lead, dtype):
    weight = quantize((96, 128))
    x, g = normal(1, *lead, 128, dtype=dtype), normal(2, *lead, 96, dtype=dtype)
    y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), x)
    (dx,) = vjp(g)
    assert (y.shape, dx.shape) == ((*lead, 96), x.shape)
    w = weight.dequantize(dtype)
    assert_product(y.reshape(-1, 96), x.reshape(-1, 128), w)
    assert_product(dx.reshape(-1, 128), g.reshape(-1, 96), w.T)


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
def test_gradient_to_bias_of_an_empty_batch_is_zero(lead):
    weight = quantize((96, 128))
    x = jnp.zeros((*lead, 128))
    dbias = jax.grad(lambda b: q4jax.matmul_4bit(x, weight, bias=b).sum())(jnp.ones(96))
    np.testing.assert_array_equal(dbias, jnp.zeros(96))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
def test_formats(quant_type, nested, blocksize):
    weight = quantize((24, 256), blocksize, nested, quant_type)
    x = normal(1, 3, 256)
    assert_product(q4jax.matmul_4bit(x, weight), x, weight.dequantize())
    packed, state = weight.packed, weight.quant_state
    np.testing.assert_array_equal(q4jax.matmul_4bit(x, packed, state), q4jax.matmul_4bit(x, weight))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_dtype(x_dtype, bias_dtype):
    """The bias is added before the one rounding."""
    weight = quantize((24, 64))
    x, bias = normal(1, 3, 64, dtype=x_dtype), normal(2, 24, dtype=bias_dtype)
    y, vjp = jax.vjp(lambda b: q4jax.matmul_4bit(x, weight, bias=b), bias)
    assert_product(y, x, weight.dequantize(x_dtype), bias)
    assert vjp(y)[0].dtype == bias.dtype


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (24, 40)])
def test_one_rounding_of_the_weight(shape, stored, compute):
    """One-hot activations read the weight out: the same rounded one forward and backward."""
    weight = Params4bit.quantize(normal(0, *shape, dtype=stored), 64, True, "nf4")
    n, k = shape
    expected = np.asarray(weight.dequantize(compute))
    y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), jnp.eye(k, dtype=compute))
    np.testing.assert_array_equal(y, expected.T)
    tall, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), jnp.zeros((n, k), compute))
    np.testing.assert_array_equal(vjp(jnp.eye(n, dtype=tall.dtype))[0], expected)


@pytest.mark.parametrize(("shape", "blocksize"), [((48, 64), 64), ((24, 40), 64)])
def test_check_grads(shape, blocksize):
    weight = quantize(shape, blocksize)
    x, bias = normal(1, 3, shape[1]), normal(2, shape[0])

    def f(x, bias):
        return jnp.tanh(q4jax.matmul_4bit(x, weight, bias=bias) / 8)

    check_grads(f, (x, bias), order=2, modes=["rev"], rtol=2e-2, atol=2e-3, eps=1e-2)


@pytest.mark.parametrize("forward_mode", [jax.jacfwd, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_forward_mode_is_a_clear_error(forward_mode):
    weight = quantize((24, 64))
    with pytest.raises(TypeError, match="forward-mode|jvp"):
        forward_mode(lambda x: q4jax.matmul_4bit(x, weight))(normal(1, 2, 64))


@pytest.mark.parametrize("shape", [(48, 64), (24, 40)])
def test_vmap_over_experts_and_over_x(shape):
    w, x = normal(0, 3, *shape), normal(1, 3, 5, shape[1])
    experts = jax.vmap(lambda w: Params4bit.quantize(w, 64, True, "nf4"))(w)
    dense = jax.vmap(Params4bit.dequantize)(experts)
    y, vjp = jax.vjp(lambda x: jax.vmap(q4jax.matmul_4bit)(x, experts), x)
    (dx,) = vjp(y)
    one = jax.tree.map(lambda a: a[1], experts)
    shared = jax.vmap(lambda x: q4jax.matmul_4bit(x, one))(x)
    for i in range(3):
        assert_product(y[i], x[i], dense[i])
        assert_product(dx[i], y[i], dense[i].T)
        assert_product(shared[i], x[i], dense[1])


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (24, 40)])
def test_codes_are_the_only_weight_sized_residual(shape, jitted):
    weight = quantize(shape)
    f = jax.jit(q4jax.matmul_4bit) if jitted else q4jax.matmul_4bit
    _, vjp = jax.vjp(lambda x, b: f(x, weight, bias=b), normal(1, 3, shape[1]), normal(2, shape[0]))
    residuals = [a for a in jax.tree.leaves(vjp) if hasattr(a, "nbytes")]
    assert residuals
    assert sum(a.nbytes for a in residuals) <= weight.nbytes + normal(2, shape[0]).nbytes
    assert all(a.dtype == jnp.uint8 for a in residuals if a.size >= weight.packed.size)


def abstract(n, k, dtype, m):
    weight = jax.eval_shape(lambda w: Params4bit.quantize(w, 64, True, "nf4"), struct(n, k))
    return struct(m, k, dtype=dtype), struct(m, n, dtype=dtype), weight


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def forward(x, g, weight):
    return q4jax.matmul_4bit(x, weight)


def backward(x, g, weight):
    return jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), x)[1](g)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the promise is about the CPU")
@pytest.mark.parametrize("m", [1, 16, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("f", [forward, backward])
def test_the_weight_is_never_in_memory(f, n, k, dtype, m):
    compiled = jax.jit(f).lower(*abstract(n, k, dtype, m)).compile()
    itemsize = jnp.dtype(dtype).itemsize
    # For bfloat16, XLA's CPU backend copies the operand and the result once, as 16-bit integers:
    # these are not of the weight's size, and weigh only where M is large.
    copies = m * (n + k) * itemsize if dtype == "bfloat16" else 0
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * n * k * itemsize + copies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("f", [forward, backward])
def test_on_gpu_it_is_one_dot_of_the_whole_weight(f, dtype):
    traced = jax.jit(f).trace(*abstract(256, 512, dtype, 16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 1
    assert "tensor<256x512x" in dots[0]
    assert "stablehlo.while" not in text


def test_few_frames_from_the_call_to_the_implementation(monkeypatch):
    """On one device, with `implementation=None`: a traceback that a person reads at once."""
    frames = []

    class Probe:
        name = "probe"
        takes_stacks = False

        def is_preferred(self, op, dtype, rows):
            return True

        def linear(self, x, arrays, bias, *, spec):
            stack = traceback.extract_stack()
            frames.extend(f.name for f in stack if "q4jax" in Path(f.filename).parts[-3:-1])
            return jnp.zeros((x.shape[0], spec.shape[0]), x.dtype)

    weight = quantize((24, 64))
    monkeypatch.setitem(registry.AUTOMATIC, jax.default_backend(), (Probe(),))
    jax.clear_caches()
    q4jax.matmul_4bit(jnp.ones((2, 64)), weight)
    jax.clear_caches()
    assert frames[0] == "matmul_4bit"
    assert len(frames) <= 8, frames


def test_explicit_axes_of_size_one():
    """They are in the operands' types, though they split nothing."""
    axes = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((1, 1), ("batch", "part"), devices=jax.devices()[:1], axis_types=axes)
    w, x = normal(0, 48, 64), normal(1, 3, 64)
    weight = q4jax.Params4bit.quantize(w, 64, True, "nf4", implementation="xla")
    with jax.set_mesh(mesh):
        put = jax.device_put
        found = q4jax.Params4bit.quantize(
            put(w, P("part", "batch")), 64, True, "nf4", implementation="xla"
        )
        y = q4jax.matmul_4bit(put(x, P("batch")), found, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, found, weight)
    expected = q4jax.matmul_4bit(x, weight, implementation="xla")
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
