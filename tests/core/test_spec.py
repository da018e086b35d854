"""`QuantSpec`: layouts, tags, and what it refuses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from q4jax import QuantSpec

SPEC = QuantSpec("nf4", 64, 256, "float32", (128, 256))


@pytest.mark.parametrize(
    ("shape", "blocksize", "matrix", "packed", "absmax"),
    [
        ((128, 256), 64, (128, 256), (128, 128), (128, 4)),
        ((3, 128, 256), 64, (128, 256), (128, 128), (128, 4)),  # leading axes are not static
        ((64,), 64, (64,), (32,), (1,)),
        ((17, 31), 64, (17, 31), (264,), (9,)),  # flat, of an odd count
        ((3, 17, 32), 64, (3, 17, 32), (816,), (26,)),  # flat: the whole shape
        ((1, 1), 4096, (1, 1), (1,), (1,)),
    ],
)
def test_layout(shape, blocksize, matrix, packed, absmax):
    spec = QuantSpec.from_shape(shape, "float32", "nf4", blocksize, False)
    assert (spec.shape, spec.packed_shape, spec.absmax_shape) == (matrix, packed, absmax)
    assert spec.in_rows == (shape[-1] % blocksize == 0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(7,), (128, 256), (3, 5, 7)])
def test_tag_round_trip(quant_type, nested, dtype, shape):
    spec = QuantSpec(quant_type, 128, nested, dtype, shape)
    assert QuantSpec.parse(spec.tag()) == spec
    assert spec.tag() in repr(spec)


def test_tag_text():
    assert SPEC.tag() == "nf4_b64_n256_float32_128x256"


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "nf4",
        "nf4_b64_n256_float32",
        "nf4_b64_n256_float32_",
        "nf4_b64_n256_float32_128x",
        "nf4_b64_n256_float64_128x256",
        "int8_b64_n256_float32_128x256",
        "nf4_b65_n256_float32_128x256",
        "nf4_b64_n128_float32_128x256",
        "nf4_b64_n256_float32_0x256",
        "nf4_b64_n256_float32_2x128x256",
        "nf4_b64_n256_float32_128x256\n",
        " nf4_b64_n256_float32_128x256",
    ],
)
def test_parse_refuses(tag):
    with pytest.raises(ValueError, match=r"tag|must be|invalid|must have"):
        QuantSpec.parse(tag)


@pytest.mark.parametrize(
    "tag",
    [
        "nf4_b064_n256_float32_128x256",
        "nf4_b64_n0256_float32_128x256",
        "nf4_b64_n256_float32_0128x256",
        "nf4_b\u0666\u0664_n256_float32_128x256",
    ],
)
def test_parse_refuses_what_tag_cannot_have_written(tag):
    with pytest.raises(ValueError, match="tag"):
        QuantSpec.parse(tag)


def test_equal_specs_are_one():
    twin = QuantSpec("nf4", np.int64(64), 256, jnp.float32, [128, 256])
    assert (twin, hash(twin), twin.tag()) == (SPEC, hash(SPEC), SPEC.tag())


@pytest.mark.parametrize(
    "change",
    [
        {"quant_type": "fp4"},
        {"blocksize": 128},
        {"nested_blocksize": 0},
        {"dtype": "bfloat16"},
        {"shape": (256, 128)},
    ],
)
def test_every_field_counts(change):
    other = dataclasses.replace(SPEC, **change)
    assert other != SPEC
    assert other.tag() != SPEC.tag()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.blocksize = 128


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quant_type", "int4", "quant_type must be 'nf4' or 'fp4', got 'int4'"),
        ("quant_type", None, "quant_type must be 'nf4' or 'fp4', got None"),
        ("blocksize", 100, r"blocksize 100; allowed: \[32, 64"),
        ("blocksize", 0, "blocksize 0"),
        ("blocksize", True, "blocksize True"),
        ("blocksize", 64.0, r"blocksize 64\.0"),
        ("blocksize", "64", "blocksize '64'"),
        ("blocksize", [64], r"blocksize \[64\]"),
        ("nested_blocksize", 128, r"nested_blocksize must be 0 \(plain\) or 256, got 128"),
        ("dtype", ",", "dtype must be float32, float16 or bfloat16, got ,"),
        ("dtype", "float64", "dtype must be float32, float16 or bfloat16, got float64"),
        ("dtype", "int8", "dtype must be .* got int8"),
        ("dtype", "float", "dtype must be .* got float64"),
        ("dtype", "nonsense", "dtype must be .* got nonsense"),
        ("shape", (), r"shape must have at least one axis and no empty one, got \(\)"),
        ("shape", (0, 64), r"shape must .* got \(0, 64\)"),
        ("shape", (2, 128, 256), r"shape must be the matrix shape.* got \(2, 128, 256\)"),
        ("shape", (1.5, 64), r"shape .*1\.5"),
    ],
)
def test_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **{field: value})


def test_one_axis_of_codes_is_counted_in_int32():
    assert QuantSpec("nf4", 64, 0, "float32", (2**26 - 1, 63)).packed_shape == (2113929185,)
    with pytest.raises(ValueError, match=r"shape \(100000000, 50\) has 5000000000 elements in one"):
        QuantSpec("nf4", 64, 0, "float32", (100_000_000, 50))
    assert QuantSpec("nf4", 64, 0, "float32", (100_000_000, 64)).in_rows
