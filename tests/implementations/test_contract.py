"""The contract that every implementation keeps, over all that are registered.

An implementation that is added to `q4jax.ops.registry.IMPLEMENTATIONS` is tested here without
another line. Interpreted Pallas kernels fill what is outside an array with NaN (the least integer,
for integers), so a mask that lets any of it through shows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec
from tests.support import oracle, products
from tests.support.implementations import params, unsupported, variants
from tests.support.kernel_checks import check, odd_input
from tests.support.kernel_matrix import DTYPES, cases
from tests.support.random_arrays import decoded, normal, random_weight
from tests.support.vectors import BLOCKSIZES, MANIFEST, decode, npz, under

CASES = cases()
QUANTIZERS = params(lambda v: v.name != "triton_interpreted")
PUBLIC = params(lambda v: v.public)
# Golden files of whole blocks and of ragged ones, in three dtypes. The C++ kernels take all.
GOLDEN = ("128x256_float32", "17x31_bfloat16", "24x80_float16", "4x16x32_float32", "1x1_float16")


def call(variant, op, *operands, **static):
    """The op's results, or a skip with the implementation's reason."""
    try:
        with variant.context():
            return jax.block_until_ready(variant.run(op, *operands, **static))
    except NotImplementedError as error:
        unsupported(variant, error)


def roundings(variant):
    """Of a product beside those of its terms; Pallas kernels split sums over programs."""
    return 16 if variant.name.startswith("pallas") else 2


def assert_product(variant, *product):
    """The product within its bound."""
    products.assert_product(*product, roundings=roundings(variant))


@pytest.mark.parametrize("variant", [pytest.param(v, id=v.name) for v in variants()])
def test_runs_here(variant):
    """Each implementation runs here or says why it does not."""
    if variant.skip:
        assert "\n" not in variant.skip
        pytest.skip(variant.skip)


def test_size_of_the_matrix():
    assert len(set(CASES)) == len(CASES) >= 1000
    operations = {"quantize", "dequantize", "linear", "linear_transpose"}
    assert {case.operation for case in CASES} == operations


def times(values, quick):
    """Parameters `variant` and another; the core tier has `quick` ones of what compiles slowly."""
    return [
        pytest.param(
            *variant.values,
            value,
            id=f"{getattr(value, 'name', value)}-{variant.id}",
            marks=[*variant.marks, *[pytest.mark.heavy] * (number >= quick)]
            if variant.id.startswith(("pallas", "xla_for_tpu"))
            else variant.marks,
        )
        for variant in params()
        for number, value in enumerate(values)
    ]


def pytest_generate_tests(metafunc):
    count = metafunc.config.getoption("--kernel-calls")
    if "more_case" in metafunc.fixturenames:
        metafunc.parametrize("more_case", CASES[32:count], ids=lambda case: case.name)


@pytest.mark.parametrize(("variant", "case"), times(CASES[:32], quick=12))
def test_matrix(variant, case):
    check(case, functools.partial(call, variant), roundings(variant))


@pytest.mark.heavy
@pytest.mark.parametrize("variant", params(lambda v: v.name == "pallas_interpret"))
def test_more_of_the_matrix(variant, more_case):
    check(more_case, functools.partial(call, variant), roundings(variant))


# XLA compiles each shape anew: a sample of the files is enough for the others.
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, *variant.values, id=f"{name}-{variant.id}")
        for name in sorted(MANIFEST["quant"])
        for variant in QUANTIZERS
        if name in GOLDEN or variant.values[0].public == "native"
    ],
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_golden(variant, name, quant_type):
    """The bytes that bitsandbytes wrote."""
    file, info = npz(f"quant/{name}.npz"), MANIFEST["quant"][name]
    w = jnp.asarray(decode(file["input"], info["dtype"]))
    blocksizes = BLOCKSIZES if variant.public == "native" else (64, 256)
    for blocksize in blocksizes:
        expected = under(f"{quant_type}/{blocksize}/", file)
        if "packed" not in expected:
            continue
        spec = QuantSpec.from_shape(w.shape, w.dtype, quant_type, blocksize, False)
        packed, absmax = call(variant, "quantize", w, spec=spec)
        np.testing.assert_array_equal(np.ravel(packed), np.ravel(expected["packed"]))
        assert oracle.same_bits(np.ravel(absmax), np.ravel(expected["absmax"]))


@pytest.mark.parametrize("variant", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [779, 31])
def test_odd_input_as_the_reference(variant, size, quant_type, dtype):
    w = odd_input(dtype)[:size]
    spec = QuantSpec.from_shape(w.shape, dtype, quant_type, 64, False)
    expected = variants()[0].run("quantize", w, spec=spec)
    for found, reference in zip(call(variant, "quantize", w, spec=spec), expected, strict=True):
        assert oracle.same_bits(found, reference)


@pytest.mark.parametrize("variant", QUANTIZERS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_threshold_and_its_neighbours(variant, quant_type):
    """Blocks with scale 1, in which every other value is on or beside a threshold."""
    at = oracle.midpoints(oracle.CODE[quant_type][oracle.ORDER[quant_type]])
    np.testing.assert_array_equal(at, codebooks.CODEBOOKS[quant_type].thresholds)
    values = np.concatenate([at, np.nextafter(at, np.float32(2)), np.nextafter(at, -np.float32(2))])
    w = np.concatenate([np.resize(values, 96).reshape(2, 48), np.ones((2, 16), np.float32)], axis=1)
    spec = QuantSpec.from_shape(w.shape, "float32", quant_type, 64, False)
    packed, _ = call(variant, "quantize", jnp.asarray(w), spec=spec)
    np.testing.assert_array_equal(np.ravel(packed), oracle.quantize(w, quant_type, 64)[0])


@pytest.mark.parametrize("variant", QUANTIZERS)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5000])
def test_double_quantization_as_the_reference(variant, size):
    absmax = jnp.abs(normal(4, size)) + 1
    for values in (absmax, jnp.ones(size), absmax.at[0].set(jnp.nan), absmax.at[0].set(jnp.inf)):
        expected = variants()[0].run("double_quantize", values)
        for found, reference in zip(
            call(variant, "double_quantize", values), expected, strict=True
        ):
            assert oracle.same_bits(found, reference)


@pytest.mark.parametrize(("variant", "blocksize"), times([32, 512], quick=1))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_weight_bit_for_bit(variant, blocksize, quant_type, dtype):
    """Read out by one-hot rows, a few and many at a time, in both products."""
    n, k = 5, 3 * blocksize
    weight = random_weight((n, k), blocksize, True, quant_type)
    w, spec = decoded(weight, dtype), weight.quant_state.spec
    some = np.linspace(0, k - 1, 40).astype(int)
    one_hot = jnp.asarray(np.eye(k)[some].astype(jnp.dtype(dtype)))
    many = call(variant, "linear", one_hot, weight.arrays, None, spec=spec)
    few = call(variant, "linear", one_hot[:7], weight.arrays, None, spec=spec)
    eye = jnp.asarray(np.eye(n).astype(jnp.dtype(dtype)))
    rows = call(variant, "linear_transpose", eye, weight.arrays, spec=spec)
    np.testing.assert_array_equal(many, w[:, some].T)
    np.testing.assert_array_equal(few, w[:, some[:7]].T)
    np.testing.assert_array_equal(rows, w)


@pytest.mark.parametrize("variant", params(lambda v: v.name != "triton_interpreted"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_not_finite(variant, dtype):
    """They reach every element of their block and nothing else."""
    weight = random_weight((4, 128), 64, False)
    spec = weight.quant_state.spec
    all_ones = np.frombuffer(np.uint32(0x7FFFFFFF).tobytes(), np.float32)[0]  # a NaN
    absmax = np.array(weight.quant_state.absmax)
    absmax[0, 0], absmax[1, 1], absmax[2, 0] = all_ones, np.inf, 1e38
    arrays = weight.arrays._replace(absmax=jnp.asarray(absmax))
    w = call(variant, "dequantize", arrays, spec=spec, dtype=jnp.dtype(dtype))
    w = np.asarray(w).astype(np.float32)
    y = call(variant, "linear", jnp.ones((1, 128), dtype), arrays, None, spec=spec)
    assert np.isnan(w[0, :64]).all()
    assert not np.isfinite(w[1, 64:]).any()
    assert np.isfinite(w[0, 64:]).all()
    assert np.isfinite(w[3]).all()
    assert np.isnan(np.asarray(y)[0, 0])


@pytest.mark.parametrize("variant", params())
def test_no_rows(variant):
    weight = random_weight((8, 64))
    spec = weight.quant_state.spec
    y = call(variant, "linear", jnp.zeros((0, 64)), weight.arrays, None, spec=spec)
    dx = call(variant, "linear_transpose", jnp.zeros((0, 8)), weight.arrays, spec=spec)
    assert (y.shape, dx.shape) == ((0, 8), (0, 64))


@pytest.mark.parametrize("variant", PUBLIC)
@pytest.mark.parametrize("batched", ["x", "weight", "both"])
def test_vmap(variant, batched):
    experts = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, 64, True, "nf4"))(
        normal(0, 3, 24, 64)
    )
    x = normal(1, 3, 5, 64)
    one = jax.tree.map(lambda a: a[1], experts)
    axes = {"x": (0, None), "weight": (None, 0), "both": (0, 0)}[batched]
    args = x if axes[0] == 0 else x[0], experts if axes[1] == 0 else one
    matmul = functools.partial(q4jax.matmul_4bit, implementation=variant.public)
    with variant.context():
        y = jax.jit(jax.vmap(matmul, axes))(*args)
    for i in range(3):
        weight = jax.tree.map(lambda a, i=i: a[i], experts) if axes[1] == 0 else one
        assert_product(
            variant, y[i], x[i] if axes[0] == 0 else x[0], weight.dequantize(implementation="xla")
        )


@pytest.mark.parametrize("variant", PUBLIC)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_rounded_weight(variant, dtype):
    weight = random_weight((70, 192))
    x, bias = normal(1, 5, 192, dtype=dtype), normal(2, 70)
    w = np.asarray(weight.dequantize(dtype, implementation="xla"))

    def matmul(x, bias):
        return q4jax.matmul_4bit(x, weight, bias=bias, implementation=variant.public)

    with variant.context():
        y, vjp = jax.vjp(matmul, x, bias)
        dx, dbias = vjp(y)
    assert_product(variant, y, x, w, bias)
    assert_product(variant, dx, y, w.T)
    np.testing.assert_allclose(dbias, np.asarray(y).astype(np.float32).sum(0), rtol=1e-5)


@pytest.mark.parametrize("variant", PUBLIC)
def test_scan_over_layers(variant):
    layers = [random_weight((64, 64)), random_weight((64, 64), 64, True, "nf4")]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x = normal(1, 2, 64)

    def matmul(x, weight):
        return q4jax.matmul_4bit(x, weight, implementation=variant.public) / 8

    with variant.context():
        last, _ = jax.lax.scan(lambda x, w: (matmul(x, w), None), x, stacked)
        expected = matmul(matmul(x, layers[0]), layers[1])
    np.testing.assert_allclose(last, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", PUBLIC)
def test_a_joint_weight_and_a_stacked_one(variant):
    w = normal(0, 3, 20, 64)
    try:
        with variant.context():
            weight = q4jax.Params4bit.quantize(w, 64, True, "fp4", implementation=variant.public)
            stacked = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, 64, True, "nf4"))(w)
            dense = [v.dequantize(implementation=variant.public) for v in (weight, stacked)]
    except NotImplementedError as error:
        unsupported(variant, error)
    expected = q4jax.Params4bit.quantize(w, 64, True, "fp4", implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, weight, expected)
    for found, reference in zip(dense, (expected, stacked), strict=True):
        np.testing.assert_array_equal(found, reference.dequantize(implementation="xla"))
