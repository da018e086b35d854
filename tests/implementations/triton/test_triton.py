"""The Triton kernels: interpreted against the reference, and compiled without a GPU."""

import concurrent.futures
import multiprocessing
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import q4jax
from q4jax.ops.registry import IMPLEMENTATIONS
from q4jax.triton import requirements as backend
from q4jax.triton.constants import KernelConstants
from tests.support.gpu.aot import compiles_triton
from tests.support.gpu.targets import GPUS

works = pytest.mark.skipif(bool(backend._missing()), reason=f"it {backend._missing()}")
compiles = compiles_triton()
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def interpreted():
    """Runs a function of `triton_interpreter` in the process that it needs."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("JAX_PLATFORMS", "cpu")
            pool.submit(int).result()  # starts it
        yield lambda name, *args: pool.submit(_call, name, *args).result()


def _call(name, *args):
    from tests.support.gpu import triton_interpreter

    return getattr(triton_interpreter, name)(*args)


def _weight(n=8, k=128, **quantization):
    return q4jax.Params4bit.quantize(jnp.ones((n, k)), **({"blocksize": 64} | quantization))


@pytest.mark.slow
def test_is_not_imported_with_q4jax():
    code = "import sys, q4jax; print([m for m in ('triton', 'jax_triton') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("installed", "jax_version", "python", "reason"),
    [
        ("0.4.1", "0.11.2", (3, 11, 9), "Python 3.12"),
        (None, "0.11.2", (3, 12, 0), "is not installed"),
        ("0.4.1", "0.10.2", (3, 12, 0), "jax 0.11; this is 0.10.2"),
        ("0.4.1", "0.12.0.1", (3, 12, 0), "0.4.1 does not work under jax 0.12.0.1"),
    ],
)
def test_says_why_it_does_not_work(monkeypatch, installed, jax_version, python, reason):
    def version(name):
        if installed is None:
            raise backend.importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(backend.importlib.metadata, "version", version)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version__", jax_version)
    monkeypatch.setattr(sys, "version_info", python)
    backend._missing.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match=reason) as error:
            q4jax.matmul_4bit(jnp.ones((2, 128)), _weight(), implementation="triton")
    finally:
        backend._missing.cache_clear()
    assert "\n" not in str(error.value)
    assert "'triton'" in str(error.value) and "'pallas'" in str(error.value)


def test_quantize_and_dequantize_name_what_works():
    with pytest.raises(NotImplementedError, match="to quantize a weight, 'pallas', 'xla' and None"):
        q4jax.quantize_4bit(jnp.ones((8, 128)), implementation="triton")
    weight = _weight()
    with pytest.raises(NotImplementedError, match="to dequantize a weight, 'pallas'"):
        q4jax.dequantize_4bit(weight.packed, weight.quant_state, implementation="triton")


@works
def test_refuses_rows_that_are_not_whole_blocks():
    weight = _weight(k=96)
    with pytest.raises(NotImplementedError, match=r"\(8, 96\) is not a multiple of blocksize 64"):
        q4jax.matmul_4bit(jnp.ones((2, 96)), weight, implementation="triton")


@works
def test_refuses_weights_that_its_addresses_cannot_hold():
    w = jax.ShapeDtypeStruct((64, 2**23), jnp.bfloat16)
    weight = jax.eval_shape(q4jax.Params4bit.quantize, w)
    x = jax.ShapeDtypeStruct((1, 2**23), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="at most 8388352 rows and columns, not"):
        jax.eval_shape(
            lambda x, weight: q4jax.matmul_4bit(x, weight, implementation="triton"), x, weight
        )


@works
def test_refuses_another_platform_when_lowered():
    if jax.default_backend() != "cpu":
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(NotImplementedError, match="'triton' runs on NVIDIA GPUs.* is for cpu"):
        q4jax.matmul_4bit(jnp.ones((2, 128)), _weight(), implementation="triton")


@works
def test_no_rows():
    y = q4jax.matmul_4bit(jnp.ones((0, 128)), _weight(), implementation="triton")
    assert y.shape == (0, 8)


def _bound(a, b, terms, dtype):
    """How far sums of `terms` products in float32, rounded to `dtype`, may be from a @ b."""
    exact, size = a @ b, abs(a) @ abs(b)
    accumulated = terms * 2.0**-24 * size
    return exact, accumulated + 2.0**-25 + float(ml_dtypes.finfo(dtype).eps) / 2 * (
        abs(exact) + accumulated
    )


# m, n, k, blocksize: one tile and less, many tiles, tiles that overlap at the end, a tail in each
# axis, sums that are split over programs.
_SHAPES = [
    (1, 64, 256, 64),
    (3, 40, 1024, 64),
    (5, 130, 320, 64),
    (16, 64, 512, 128),
    (17, 33, 96, 32),
    (40, 70, 320, 32),
    (70, 64, 192, 64),
    (150, 140, 128, 64),
    (2, 20, 768, 256),
    (2, 12, 1024, 512),
    (2, 9, 2048, 1024),
    (2, 7, 4096, 2048),
    (2, 5, 8192, 4096),
]
_CASES = [
    pytest.param(
        *shape,
        dtype,
        ("nf4", "fp4")[i % 2],
        bool(i // 2 % 2),
        bool(i % 3),
        marks=[pytest.mark.slow] * (dtype == "float32" or shape[2] > 4096),
    )
    for dtype, shapes in {"float16": _SHAPES, "bfloat16": _SHAPES, "float32": _SHAPES[:7]}.items()
    for i, shape in enumerate(shapes)
]


@works
@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize", "dtype", "quant_type", "nested", "with_bias"), _CASES
)
def test_equals_the_reference(
    interpreted, rng, m, n, k, blocksize, dtype, quant_type, nested, with_bias
):
    quantization = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "compress_statistics": nested,
    }
    x, g, bias = (rng.normal(size=s).astype(DTYPES[dtype]) for s in ((m, k), (m, n), n))
    w = rng.normal(size=(n, k)).astype(np.float32)
    bias = bias if with_bias else None
    y, dx, dbias, w_hat = interpreted("product", x, w, bias, g, quantization)
    assert y.dtype == dx.dtype == DTYPES[dtype]
    x, g, w_hat, y, dx = (a.astype(np.float64) for a in (x, g, w_hat, y, dx))
    if with_bias:
        x = np.concatenate([x, np.ones((m, 1))], 1)
        w = np.concatenate([w_hat, bias.astype(np.float64)[:, None]], 1)
        assert dbias.shape == (n,)
    else:
        w = w_hat
    expected, bound = _bound(x, w.T, k + 1, DTYPES[dtype])
    assert (abs(y - expected) <= bound).all()
    expected, bound = _bound(g, w_hat, n, DTYPES[dtype])
    assert (abs(dx - expected) <= bound).all()


@works
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_decoded_exactly(interpreted, dtype, quant_type, nested):
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    quantization = {"quant_type": quant_type, "blocksize": 32, "compress_statistics": nested}
    columns, rows, expected = interpreted("decoded", codes, DTYPES[dtype], quantization)
    np.testing.assert_array_equal(columns.astype(np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(rows.astype(np.float32), expected.astype(np.float32))


@works
@pytest.mark.parametrize(
    "case", ["x", "weight", "both", "gradient", "x of weights", "weights of x"]
)
def test_vmap(interpreted, case):
    y, expected = interpreted("mapped", case)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def _weight_shapes(n, k, blocksize, nested):
    return jax.eval_shape(
        lambda w: q4jax.Params4bit.quantize(
            w,
            quant_type="nf4",
            blocksize=blocksize,
            compress_statistics=nested,
            check_finite=False,
        ),
        jax.ShapeDtypeStruct((n, k), jnp.float32),
    )


# m, n, k, blocksize, nested, dtype, registers at most
_LINEAR = [
    (1, 4096, 4096, 64, False, "bfloat16", 168),
    (1, 4096, 4096, 64, True, "bfloat16", 168),
    (1, 4096, 4096, 32, True, "float16", 168),
    (7, 4100, 4160, 64, True, "bfloat16", 168),
    (32, 4096, 8192, 4096, True, "bfloat16", 192),
    (64, 4096, 4096, 64, True, "float16", 200),
    (100, 4096, 4096, 64, True, "bfloat16", 255),
    (300, 4100, 4160, 64, True, "bfloat16", 255),
    (512, 4096, 4096, 64, False, "bfloat16", 255),
    (1, 4096, 4096, 64, True, "float32", 128),
    (64, 4096, 4096, 64, True, "float32", 144),
]
_TRANSPOSED = [
    (1, 4096, 4096, 64, False, "bfloat16", 168),
    (32, 4096, 4096, 64, True, "float16", 216),
    (300, 4100, 4160, 64, True, "bfloat16", 224),
    (512, 4096, 4096, 64, False, "bfloat16", 224),
    (64, 4096, 4096, 64, True, "float32", 200),
]


@compiles
@pytest.mark.parametrize("gpu", ["sm_80", "sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("operation", "m", "n", "k", "blocksize", "nested", "dtype", "registers"),
    [("linear", *case) for case in _LINEAR] + [("linear_transpose", *case) for case in _TRANSPOSED],
)
def test_compiles_well(gpu, operation, m, n, k, blocksize, nested, dtype, registers):
    from tests.support.gpu.triton_sass import kernels

    weight = _weight_shapes(n, k, blocksize, nested)
    x = jax.ShapeDtypeStruct((m, k if operation == "linear" else n), dtype)

    def function(x, arrays):
        triton = IMPLEMENTATIONS["triton"]
        product = triton.linear if operation == "linear" else triton.linear_transpose
        return product(x, arrays, *bias, spec=spec)

    spec = weight.quant_state.spec
    bias = (None,) if operation == "linear" else ()
    [kernel] = kernels(gpu, function, x, weight.arrays)
    assert not kernel.spilled
    assert not {"LDL", "STL"} & kernel.opcodes.keys()
    assert kernel.registers <= registers
    assert kernel.shared_bytes <= GPUS[gpu][-1]
    if dtype == "float32":
        return
    if x.shape[1] % 8 == 0:
        through_l1 = kernel.opcodes["LDGSTS.E.128"]  # both halves of a sector
        assert through_l1 or kernel.opcodes["LDGSTS.E.BYPASS.128"] or kernel.opcodes["LDG.E.128"]
    assert sum(kernel.opcodes[name] for name in ("HMMA", "HGMMA", "UTCHMMA"))
    if operation == "linear":
        # Hopper and Blackwell have instructions of their own.
        assert gpu in ("sm_80", "sm_89") or not kernel.opcodes["HMMA"]
    transpose = operation != "linear"
    plan = KernelConstants.from_problem(m, spec, x.dtype, frozenset(), transpose=transpose)
    weights = plan.tile.n * plan.tile.k / (32 * plan.tile.warps)  # a thread's, in one step
    # On Blackwell a step stands twice in the code.
    copies = 2 if gpu == "sm_100" else 1
    assert kernel.opcodes["PRMT"] <= (3.2 if blocksize == 32 else 2.6) * weights * copies


@compiles
def test_experts_and_their_gradient_are_two_kernels():
    from tests.support.gpu.triton_sass import kernels

    def gradient(x, weight, bias):
        def f(x):
            return q4jax.matmul_4bit(x, weight, bias=bias, implementation="triton").sum()

        return jax.value_and_grad(f)(x)

    experts, m, n, k = 3, 5, 256, 512
    weight = _weight_shapes(n, k, 64, True)
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct((experts, *a.shape), a.dtype), weight)
    x = jax.ShapeDtypeStruct((experts, m, k), "bfloat16")
    bias = jax.ShapeDtypeStruct((experts, n), "bfloat16")
    assert len(kernels("sm_90", jax.vmap(gradient), x, weights, bias)) == 2
