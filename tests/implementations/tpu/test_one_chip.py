"""Public calls compiled for one TPU: they compile, and programs that became worse turn these red.

Nothing here has run on a TPU. Cycles are XLA's estimates.
"""

import re

import jax
import jax.numpy as jnp
import pytest

import q4jax
from q4jax.ops.embedding import take_rows
from tests.support.tpu.targets import MISSING, TOPOLOGIES, compiled, on_one

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
CHIPS = list(TOPOLOGIES)
BYTES = 2  # of an element of a dense weight


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def quantize(w, quant_type="nf4", nested=True, blocksize=64):
    return q4jax.Params4bit.quantize(w, blocksize, nested, quant_type, check_finite=False)


def weight_of(*shape, **settings):
    return jax.eval_shape(lambda w: quantize(w, **settings), struct(*shape))


def gradient(x, weight, g):
    return jax.vjp(lambda x: q4jax.matmul_4bit(x, weight), x)[1](g)[0]


CALLS = {
    "quantize": lambda w, x, ids: quantize(w.dequantize()),
    "dequantize": lambda w, x, ids: w.dequantize(),
    "matmul": lambda w, x, ids: q4jax.matmul_4bit(x, w, bias=x[0, :256]),
    "gradient": lambda w, x, ids: gradient(x, w, x[:, :256]),
    "take_rows": lambda w, x, ids: take_rows(w, ids),
}
SETTINGS = {
    "nf4": {},
    "fp4-plain-4096": {"quant_type": "fp4", "nested": False, "blocksize": 4096},
    "flat": {"blocksize": 128},
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_call_compiles(settings, chip):
    columns = 4000 if settings == "flat" else 4096
    weight = weight_of(256, columns, **SETTINGS[settings])
    assert weight.quant_state.spec.in_rows == (settings != "flat")
    operands = weight, struct(16, columns), struct(16, dtype=jnp.int32)

    def all_calls(*operands):
        return [call(*operands) for call in CALLS.values()]

    assert compiled(all_calls, *on_one(chip, operands)).text


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_compile(dtype):
    weight = weight_of(256, 512)
    x, g = struct(16, 512, dtype=dtype), struct(16, 256, dtype=dtype)
    assert compiled(gradient, *on_one("v5e", (x, weight, g))).text


@pytest.mark.parametrize(
    ("rows", "most_cycles"), [(8, 0.2e6), (128, 0.25e6), (2048, 0.9e6)], ids=str
)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_product(nested, rows, most_cycles):
    """A dense one takes 0.01, 0.04 and 0.56 million cycles."""
    n = k = 4096
    operands = struct(rows, k), weight_of(n, k, nested=nested)
    program = compiled(q4jax.matmul_4bit, *on_one("v5e", operands))
    assert program.cycles <= most_cycles
    assert program.temporary <= 0.1 * n * k * BYTES
    assert not re.search(r" (gather|sort|scatter)\(", program.text)


@pytest.mark.parametrize(("rows", "most_cycles"), [(8, 0.2e6), (2048, 1.0e6)], ids=str)
def test_a_gradient(rows, most_cycles):
    n = k = 4096
    operands = struct(rows, k), weight_of(n, k), struct(rows, n)
    program = compiled(gradient, *on_one("v5e", operands))
    assert program.cycles <= most_cycles
    assert program.temporary <= 0.1 * n * k * BYTES
    assert not re.search(r" (gather|sort|scatter)\(", program.text)


@pytest.mark.parametrize(
    ("n", "k", "rows"),
    [(4096, 8192, 2048), (4096, 14336, 2048), (14336, 4096, 2048), (128256, 4096, 2048)],
    ids=str,
)
def test_a_gradient_of_a_large_weight(n, k, rows):
    """Float32 sums of the size of the result, 117 MB for the second, would be temporaries."""
    operands = struct(rows, k), weight_of(n, k), struct(rows, n)
    program = compiled(gradient, *on_one("v5e", operands))
    assert program.temporary <= 2e6  # 1.3e6 for the last and none for the others


@pytest.mark.parametrize("rows", [8, 128])
def test_a_wide_weight_is_decoded_a_chunk_at_a_time(rows):
    n, k = 28672, 8192
    program = compiled(q4jax.matmul_4bit, *on_one("v5e", (struct(rows, k), weight_of(n, k))))
    assert program.temporary <= 0.1 * n * k * BYTES


def test_a_wide_weight_and_many_rows():
    n, k = 14336, 4096
    operands = struct(2048, k), weight_of(n, k, nested=False)
    program = compiled(q4jax.matmul_4bit, *on_one("v5e", operands))
    assert program.temporary <= 0.1 * n * k * BYTES
    assert program.cpu_seconds <= 16  # 8.4 when this was written


@pytest.mark.parametrize("rows", [8, 2048])
def test_a_product_in_the_flat_layout(rows):
    n, k = 4096, 4104
    program = compiled(q4jax.matmul_4bit, *on_one("v5e", (struct(rows, k), weight_of(n, k))))
    assert program.temporary <= 0.1 * n * k * BYTES


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_quantizing(nested):
    """Rows take 3 seconds to compile on two cores. The rest is a ratio, for slower machines."""
    n, seconds = 4096, []
    for k in (4096, 4104):
        program = compiled(lambda w: quantize(w, nested=nested), *on_one("v5e", (struct(n, k),)))
        assert program.temporary <= 0.1 * n * k * BYTES
        assert not re.search(r" (gather|sort|scatter)\(", program.text)
        seconds.append(program.cpu_seconds)
    rows, flat = seconds
    assert rows <= 8
    assert flat <= 3 * rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantizing(dtype):
    n = k = 4096
    program = compiled(lambda w: w.dequantize(dtype), *on_one("v5e", (weight_of(n, k),)))
    assert program.temporary <= 0.1 * n * k * BYTES
    assert not re.search(r" (gather|sort|scatter)\(", program.text)
