"""The parts of "xla" for TPU that the contract's small problems do not reach, run on this CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.core import arithmetic, blockwise
from q4jax.core.spec import QuantSpec
from q4jax.xla.tpu import lanes, matmul, ops, quantize, scales
from q4jax.xla.tpu.chunks import over_rows
from tests.support import oracle
from tests.support.products import assert_product
from tests.support.random_arrays import decoded, normal, random_weight


def every_kind(rows, columns, dtype):
    """Numbers of all bit patterns: NaN with their payloads, infinities, subnormal numbers."""
    itemsize = np.dtype(dtype).itemsize
    bits = np.random.default_rng(0).integers(0, 256, (rows, columns * itemsize), np.uint8)
    return jnp.asarray(bits.view(dtype))


@pytest.mark.parametrize("columns", [32, 96, 256, 640])
@pytest.mark.parametrize("dtype", ["float32", "float16", jnp.bfloat16])
def test_columns_move_bit_for_bit(dtype, columns):
    x = every_kind(5, columns, dtype)
    even, odd = lanes.even_odd(x)
    with np.errstate(invalid="ignore"):
        assert oracle.same_bits(even, x[:, 0::2])
        assert oracle.same_bits(odd, x[:, 1::2])
        assert oracle.same_bits(lanes.interleave(even, odd), x)


@pytest.mark.parametrize(("blocks", "count"), [(1, 16), (3, 32), (172, 32), (256, 64)])
def test_scales_repeat_bit_for_bit(blocks, count):
    x = every_kind(3, blocks, "float32")
    assert oracle.same_bits(lanes.repeat(x, count), np.repeat(x, count, axis=1))


@pytest.fixture
def small_chunks(monkeypatch):
    """Loops of several steps and a rest."""
    monkeypatch.setattr(matmul, "_CHUNK_ELEMENTS", 32 * 128)
    monkeypatch.setattr(matmul, "_CHUNK_BESIDE_MANY_ROWS", 32 * 128)
    monkeypatch.setattr(matmul, "_FEWEST_COLUMNS", 256)
    monkeypatch.setattr(matmul, "_DENSE_CHUNK_ELEMENTS", 32 * 128)
    monkeypatch.setattr(quantize, "_TILE_ELEMENTS", 32 * 128)


@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("n", [96, 101])
def test_chunks_of_rows(n, rows, small_chunks):
    weight = random_weight((n, 128), 64, True, "nf4")
    spec, w = weight.quant_state.spec, decoded(weight)
    x, g, bias = normal(1, rows, 128), normal(2, rows, n), normal(3, n)
    assert_product(ops.linear(x, weight.arrays, bias, spec=spec), x, w, bias, 16)
    assert_product(ops.linear_transpose(g, weight.arrays, spec=spec), g, w.T, roundings=16)
    found = ops.dequantize(weight.arrays, spec=spec, dtype=np.dtype("float32"))
    assert oracle.same_bits(found, w)


@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("n", [12, 13, 40])
@pytest.mark.parametrize(("columns", "blocksize"), [(576, 64), (1024, 512), (1024, 256)])
def test_chunks_of_columns_of_a_gradient(columns, blocksize, n, rows, small_chunks):
    """One, or 32 and 8, of rows; those of columns have a rest, or cut through blocks."""
    weight = random_weight((n, columns), blocksize, True, "nf4")
    g = normal(2, rows, n)
    found = ops.linear_transpose(g, weight.arrays, spec=weight.quant_state.spec)
    assert_product(found, g, decoded(weight).T, roundings=16)


@pytest.mark.parametrize(("count", "sizes"), [(90, {90}), (128, {64}), (200, {96, 8}), (288, {96})])
def test_chunks_are_equal_where_rows_allow(count, sizes):
    found = set()

    def add(total, first, rows):
        found.add(len(rows))
        return total.at[0].add(rows.sum()).at[1].add(first)

    rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    total = over_rows(add, jnp.zeros(2), rows, columns=2, elements=2 * 96)
    assert found == sizes
    step = max(sizes)
    assert total.tolist() == [rows.sum(), sum(range(0, count, step))]


@pytest.mark.parametrize("n", [96, 101])
def test_chunks_of_a_weight_to_quantize(n, small_chunks):
    w = normal(0, n, 128)
    spec = QuantSpec.from_shape(w.shape, w.dtype, "fp4", 32, False)
    codes, absmax = oracle.quantize(w, "fp4", 32)
    packed, found = ops.quantize(w, spec=spec)
    np.testing.assert_array_equal(np.ravel(packed), codes)
    np.testing.assert_array_equal(np.ravel(found), absmax)


@pytest.mark.parametrize("shape", [(70,), (101, 130), (3, 67, 36), (4, 5)])
def test_ravel(shape, small_chunks):
    w = normal(0, *shape)
    np.testing.assert_array_equal(quantize.ravel(w), w.ravel())


@pytest.mark.parametrize(("rows", "loops"), [(2**31 // 96, True), (2**31 // 96 + 1, False)])
def test_ravel_of_more_numbers_than_int32_counts(rows, loops):
    w = jax.ShapeDtypeStruct((rows, 96), jnp.bfloat16)
    assert ("dynamic_update_slice" in str(jax.make_jaxpr(quantize.ravel)(w))) == loops


@pytest.mark.parametrize("first", [(0, 0), (6, 0), (18, 5)])
def test_a_part_of_nested_scales(first):
    absmax = jnp.abs(normal(4, 24, 50)) + 1
    codes, *statistics = blockwise.double_quantize(absmax)
    part = jax.lax.dynamic_slice(codes, first, (6, 45))
    found = scales.decode_part(part, *statistics, first, codes.shape)
    expected = blockwise.decode_absmax(codes, *statistics)
    assert oracle.same_bits(found, jax.lax.dynamic_slice(expected, first, part.shape))


def test_division_a_bit_at_a_time():
    x, by = (every_kind(400, 50, "float32") for _ in range(2))
    by = by[::-1]
    found, expected = (a.divide(x, by) for a in (arithmetic.TPU, arithmetic.PORTABLE))
    assert oracle.same_bits(found, expected)


def test_a_stack_of_flat_weights():
    """Each has blocks, and padding, of its own."""
    flat = [random_weight((510, 32), 64, False) for _ in range(2)]
    spec = flat[0].quant_state.spec
    assert not spec.in_rows
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(w.arrays for w in flat))
    found = ops.dequantize(stack, spec=spec, dtype=spec.dtype)
    np.testing.assert_array_equal(found, np.stack([decoded(w) for w in flat]))
