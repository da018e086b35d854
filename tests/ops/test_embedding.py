"""Embedding lookup: the same rows for ids of every integer dtype, in tables of every size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.core.blockwise import divide_position
from q4jax.ops.embedding import take_rows
from tests.support.random_arrays import decoded, random_weight

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50257, 64), (300, 6), (60000, 10)])
def test_ids_of_every_dtype(shape, dtype):
    """nanoGPT stores its corpora as uint16; the largest id that a dtype holds may be a row."""
    weight = random_weight(shape)
    largest = min(int(np.iinfo(dtype).max), shape[0] - 1)
    ids = np.array([0, 1, largest // 2, largest - 1, largest])
    found = take_rows(weight, jnp.asarray(ids.astype(dtype)))
    np.testing.assert_array_equal(found, decoded(weight)[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_out_of_range_are_nan(dtype):
    weight = random_weight((100, 64))
    info = np.iinfo(dtype)
    ids = np.array([100, info.max, *([-1, -100, -101] if info.min else [])]).astype(dtype)
    found = np.isnan(np.asarray(take_rows(weight, jnp.asarray(ids)))).all(-1)
    np.testing.assert_array_equal(found, [True, True, *([False, False, True] if info.min else [])])


def test_a_layer_takes_uint16(rng):
    from flax import nnx

    layer = q4jax.EmbeddingNF4(50257, 64, rngs=nnx.Rngs(0))
    ids = rng.integers(0, 50257, 20).astype(np.uint16)
    np.testing.assert_array_equal(layer(jnp.asarray(ids)), layer(jnp.asarray(ids, jnp.int32)))


@pytest.mark.parametrize("by", [2, 32, 64, 4096])
def test_positions_beyond_int32(by):
    """The rows from 42,949,672 on of a table of 43,000,000 x 50 are beyond 2^31 elements."""
    rows = np.array([0, 1, 42_949_671, 42_949_672, 42_999_999])
    quotient, remainder = jax.vmap(lambda row: divide_position(row, 50, by))(jnp.asarray(rows))
    exact = rows.astype(object)[:, None] * 50 + np.arange(50)
    np.testing.assert_array_equal(quotient, (exact // by).astype(np.int64))
    np.testing.assert_array_equal(remainder, (exact % by).astype(np.int64))
