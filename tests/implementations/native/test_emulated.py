"""Machine code for processors that this machine is not, run by an emulator.

With the extra emulate; each processor is skipped where its emulator or compiler is missing.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax import QuantSpec, codebooks
from q4jax.core import blockwise
from tests.support import oracle
from tests.support.emulated.machine import Arm, Fault, SapphireRapids, SkylakeX
from tests.support.emulated.operations import DTYPES, Operations, weight_arguments
from tests.support.emulated.program import build, compiler
from tests.support.products import assert_product

MACHINES = {
    "aarch64-neon": (Arm, "neon"),
    "aarch64-portable": (Arm, "portable"),
    "x86_64-avx512": (SkylakeX, "avx512"),
    "x86_64-avx512_bf16": (SapphireRapids, "avx512_bf16"),
}
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Where they are built; they share what they have in common."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", params=MACHINES)
def operations(request, programs):
    machine, isa = MACHINES[request.param]
    missing = machine.missing()
    if missing is None and compiler(machine.architecture) is None:
        missing = f"there is no compiler for {machine.architecture}"
    if missing is not None:
        pytest.skip(missing)
    program = build(machine.architecture, isa, programs)
    return Operations(machine(), program)


@contextlib.contextmanager
def aligned(operations, where):
    operations.aligned = where
    try:
        yield
    finally:
        operations.aligned = "end"


def random_weight(rng, n, k, blocksize, quant_type="nf4", nested=False):
    """A weight's arguments, its codes and its scales."""
    packed = rng.integers(0, 256, n * k // 2, dtype=np.uint8)
    count = n * k // blocksize
    if nested:
        codes = rng.integers(0, 256, count, dtype=np.uint8)
        nested_absmax = rng.random(-(-count // 256), dtype=np.float32)
        scales = codes, nested_absmax, np.float32(1.5)
        plain = oracle.decode_scales(*scales, codebooks.DYNAMIC_MAP)
    else:
        scales = plain = rng.random(count, dtype=np.float32) + np.float32(0.5)
    return weight_arguments(packed, scales, n, quant_type, blocksize), packed, plain


def random(rng, dtype, *shape):
    return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])


def assert_same(found, expected):
    """Equal bits; an expected NaN takes any NaN."""
    assert oracle.same_bits(found, expected)


def assert_quantized(operations, w, quant_type, blocksize):
    """As the reference on JAX."""
    spec = QuantSpec.from_shape(w.shape, w.dtype, quant_type, blocksize, False)
    expected = jax.jit(blockwise.quantize_flat, static_argnums=1)(jnp.asarray(w), spec)
    for found, value in zip(operations.quantize(w, quant_type, blocksize), expected, strict=True):
        assert_same(found, np.asarray(value))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize(operations, blocksize, quant_type, rng):
    for dtype in DTYPES:
        w = random(rng, dtype, 2 * blocksize)
        assert_quantized(operations, w, quant_type, blocksize)


def odd_blocks(rng):
    """Blocks of 64: all kinds of numbers."""
    blocks = rng.standard_normal((13, 64))
    blocks[1] = 0
    blocks[2, 5] = np.nan
    blocks[3, 7] = -np.inf
    blocks[4] *= 1e-40  # subnormal in float32
    blocks[5] *= 1e38
    blocks[6] *= 1e-37
    blocks[7] = -0.0
    blocks[8, :2] = np.nan, np.inf
    blocks[9] = np.sign(blocks[9])
    blocks[10] *= 1e-5  # subnormal in float16
    blocks[11, ::3] *= 1e-40
    blocks[12] = np.copysign(np.nan, -1)
    return blocks.astype(np.float32).ravel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_quantize_odd_input(operations, quant_type, dtype, rng):
    w = odd_blocks(rng).astype(DTYPES[dtype])
    for size in (w.size, w.size - 1, 500, 31, 1):  # with a partial block, and an odd number
        assert_quantized(operations, w[:size], quant_type, 64)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_on_and_beside_thresholds(operations, quant_type):
    at = oracle.midpoints(oracle.CODE[quant_type][oracle.ORDER[quant_type]])
    values = [at, np.nextafter(at, np.float32(2)), np.nextafter(at, -np.float32(2))]
    w = np.resize(np.concatenate(values), 96).reshape(2, 48)
    w = np.concatenate([w, np.ones((2, 16), np.float32)], axis=1).ravel()
    packed, absmax = operations.quantize(w, quant_type, 64)
    expected = oracle.quantize(w, quant_type, 64)
    assert_same(packed, expected[0])
    assert_same(absmax, expected[1])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize(operations, blocksize, quant_type, nested, rng):
    n, k = 3, 3 * blocksize if blocksize < 512 else blocksize
    weight, packed, scales = random_weight(rng, n, k, blocksize, quant_type, nested)
    for dtype in DTYPES:
        expected = oracle.dequantize(packed, scales, quant_type, blocksize, (n, k), dtype)
        assert_same(operations.dequantize(weight, dtype), expected)


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_dequantize_odd_scales(operations, blocksize):
    """Every code with scales at the limits of each dtype; products on the middle of two values."""
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    others = [0, -0.0, 1, -2.5, np.inf, -np.inf, np.nan, 1e-38, 3e38, 65504, 65520, 1e5, 6e-8, 1e-7]
    scales = np.array([*ties, *others, 2.9e-8, 1e-40], np.float32)
    packed = np.resize(np.arange(256).astype(np.uint8), scales.size * blocksize // 2)
    n = 4
    weight = weight_arguments(packed, scales, n, "nf4", blocksize)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(n, -1)
    with np.errstate(all="ignore"):
        w = codebooks.CODEBOOKS["nf4"].values[codes] * flush(scales).repeat(blocksize).reshape(
            n, -1
        )
    for dtype in DTYPES:
        found, expected = operations.dequantize(weight, dtype), flush(w).astype(DTYPES[dtype])
        assert_same(found, expected)


def flush(x):
    """Subnormals are zeros that keep their sign."""
    return np.where(np.abs(x) < oracle.TINY, np.copysign(np.float32(0), x), x)


def decoded(packed, scales, weight, dtype, quant_type="nf4"):
    shape = weight["n"], weight["k"]
    return oracle.dequantize(packed, scales, quant_type, weight["blocksize"], shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize", "nested"),
    [
        (1, 5, 32, 32, False),
        (1, 37, 96, 32, True),
        (2, 17, 160, 32, False),
        (3, 50, 192, 64, True),
        (4, 16, 384, 128, False),
        (5, 7, 4096, 4096, False),
        (6, 33, 256, 256, False),
        (7, 18, 320, 64, False),
        (8, 49, 128, 64, True),
        (9, 50, 96, 32, False),
        (16, 53, 192, 64, True),
        (17, 1, 512, 512, False),
        (31, 49, 320, 64, False),
        (40, 71, 608, 32, True),
    ],
)
def test_products(operations, m, n, k, blocksize, nested, dtype, rng):
    weight, packed, scales = random_weight(rng, n, k, blocksize, "nf4", nested)
    w = decoded(packed, scales, weight, dtype)
    x, g = random(rng, dtype, m, k), random(rng, dtype, m, n)
    bias = random(rng, ["float32", "bfloat16", "float16"][m % 3], n) if m % 4 else None
    assert_product(operations.linear(x, weight, bias), x, w, 0.0 if bias is None else bias)
    assert_product(operations.transposed(g, weight), g, w.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_products(operations, dtype, rng):
    weight, packed, scales = random_weight(rng, 19, 320, 64, "fp4", True)
    w = decoded(packed, scales, weight, dtype, "fp4")
    for m in (1, 12):
        x, g = random(rng, dtype, m, 320), random(rng, dtype, m, 19)
        assert_product(operations.linear(x, weight), x, w)
        assert_product(operations.transposed(g, weight), g, w.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_before_the_arrays_is_read(operations, dtype, rng):
    """The other tests find what is read behind them."""
    weight, _, _ = random_weight(rng, 17, 96, 32, nested=True)
    with aligned(operations, "start"):
        for m in (1, 3, 19):
            operations.linear(random(rng, dtype, m, 96), weight, random(rng, dtype, 17))
            operations.transposed(random(rng, dtype, m, 17), weight)
        operations.dequantize(weight, dtype)
        operations.quantize(random(rng, dtype, 17 * 96 - 1), "nf4", 32)


def test_what_the_emulator_finds(operations, rng):
    """A row more than there is: the arrays end where memory does."""
    weight, _, _ = random_weight(rng, 4, 64, 64)
    x = random(rng, "float32", 2, 64)
    for name in ("packed", "plain"):
        smaller = weight | {name: weight[name][:-1]}
        with pytest.raises(Fault):
            operations.linear(x, smaller)
    assert np.isfinite(operations.linear(x, weight)).all()


def test_only_large_products_in_bfloat16_need_bf16(programs, rng):
    """The processor without it raises where they begin."""
    if (missing := SkylakeX.missing()) is not None or compiler("x86_64") is None:
        pytest.skip(missing or "there is no compiler for x86_64")
    operations = Operations(SkylakeX(), build("x86_64", "avx512_bf16", programs))
    weight, packed, scales = random_weight(rng, 17, 64, 64)
    for m, dtype in [(8, "bfloat16"), (9, "float32"), (9, "float16")]:
        x = random(rng, dtype, m, 64)
        assert_product(operations.linear(x, weight), x, decoded(packed, scales, weight, dtype))
    with pytest.raises(Fault, match="exception 6"):
        operations.linear(random(rng, "bfloat16", 9, 64), weight)
