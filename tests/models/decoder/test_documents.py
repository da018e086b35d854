"""Several documents in a row: each computes as alone, and none is taken for the end of another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.models import Llama
from q4jax.models.decoder.config import FULL, SLIDING, ExpertsConfig
from q4jax.models.decoder.kv_cache import KVCache
from q4jax.models.decoder.rope_scaling import RopeScaling

LENGTHS = (4, 1, 6)
SEGMENTS = np.repeat([0, 1, 2], LENGTHS)[None]
RESTARTED = np.concatenate([np.arange(length) for length in LENGTHS])[None]

VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 3},
    "some layers with a window": {
        "sliding_window": 3,
        "layer_types": (SLIDING, FULL, SLIDING),
    },
    "dynamic rope": {
        "max_position_embeddings": 4,
        "rope_scaling": RopeScaling("dynamic", 2.0),
    },
}


@pytest.fixture(scope="module")
def row(input_ids):
    return input_ids[:1]


def alone(model, forward, row, **kwargs):
    """Return the logits of each document by itself, one after the other."""
    ends = np.cumsum(LENGTHS)
    parts = [row[:, end - length : end] for end, length in zip(ends, LENGTHS, strict=True)]
    return np.concatenate([forward(model, part, **kwargs) for part in parts], axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_document_computes_as_alone(config, row, variant, forward, relative):
    model = Llama(dataclasses.replace(config, **VARIANTS[variant]), rngs=nnx.Rngs(1))
    expected = alone(model, forward, row)
    assert relative(forward(model, row), expected) > 1e-2
    for how in ({}, {"positions": RESTARTED}, {"positions": jnp.asarray(RESTARTED, jnp.uint8)}):
        assert relative(forward(model, row, segment_ids=SEGMENTS, **how), expected) < 2e-6


@pytest.mark.slow
def test_experts_and_4_bit_layers(config, row, forward, relative):
    config = dataclasses.replace(config, experts=ExpertsConfig(4, 2, 32), model_type="mixtral")
    model = q4jax.quantize_model(Llama(config, rngs=nnx.Rngs(1)), blocksize=32)
    packed = forward(model, row, segment_ids=SEGMENTS)
    assert relative(packed, alone(model, forward, row)) < 2e-6


def test_only_equality_of_the_ids_counts(model, row, forward):
    expected = forward(model, row, segment_ids=SEGMENTS)
    for ids in (SEGMENTS + 7, -SEGMENTS, SEGMENTS.astype(np.int8), SEGMENTS.tolist()):
        ids = jnp.asarray(ids) if isinstance(ids, list) else ids
        np.testing.assert_array_equal(forward(model, row, segment_ids=ids), expected)


@pytest.mark.parametrize("window", [None, 3])
def test_documents_may_be_interleaved(config, row, window, forward, relative):
    model = Llama(dataclasses.replace(config, sliding_window=window), rngs=nnx.Rngs(1))
    ids = np.array([[0, 1, 0, 0, 2, 1, 1, 0, 0, 2, 1]])
    logits = np.asarray(forward(model, row, segment_ids=ids))
    for document in range(3):
        own = ids[0] == document
        assert relative(logits[:, own], forward(model, row[:, own])) < 2e-6


@pytest.mark.parametrize("side", ["left", "right", "between"])
@pytest.mark.parametrize("padding_id", [0, 9])
def test_padding_beside_documents(config, row, side, padding_id, forward, relative):
    model = Llama(dataclasses.replace(config, sliding_window=3), rngs=nnx.Rngs(1))
    at = {"left": 0, "between": 4, "right": 11}[side]
    ids, segments = (
        np.insert(np.asarray(array), [at] * 3, fill, axis=1)
        for array, fill in ((row, 5), (SEGMENTS, padding_id))
    )
    mask = np.insert(np.ones((1, 11), int), [at] * 3, 0, axis=1)
    logits = np.asarray(forward(model, ids, attention_mask=mask, segment_ids=segments))
    assert np.isfinite(logits).all()
    assert relative(logits[:, mask[0] == 1], alone(model, forward, row)) < 2e-6


def test_rows_with_different_documents(model, input_ids, forward, relative):
    segments = np.concatenate([SEGMENTS, np.zeros_like(SEGMENTS)])
    logits = np.asarray(forward(model, input_ids, segment_ids=segments))
    assert relative(logits[:1], alone(model, forward, input_ids[:1])) < 2e-6
    assert relative(logits[1:], forward(model, input_ids[1:])) < 2e-6


def test_gradients_stay_within_a_document(model, row):
    """The loss of one document has no gradient at the embeddings of another one's tokens."""
    ids = jnp.arange(11)[None]

    @nnx.jit
    def gradient(model):
        return nnx.grad(lambda m: jnp.sum(m(ids, segment_ids=SEGMENTS)[:, 5:] ** 2))(model)

    rows = np.abs(np.asarray(gradient(model)["embed_tokens"]["embedding"][...])).max(axis=1)
    assert (rows[:5] == 0).all() and (rows[5:11] > 0).all()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (RESTARTED, r"positions must rise .*, got 0 after 3 in row 0; segment_ids"),
        (np.zeros((1, 11), int), "got 0 after 0"),
        (np.arange(11)[None].astype(np.uint8)[:, ::-1], "got 9 after 10"),
        (jnp.arange(11)[None] - 1, "at least 0, .* got -1 in row 0"),
        (np.arange(11)[None] * 1.0, "positions must be integers, got float64"),
        (np.arange(11), r"positions must be \(1, 11\) as input_ids, got \(11,\)"),
        (np.arange(10)[None], r"got \(1, 10\)"),
        (np.arange(11)[None] + 2**31, "positions must be int32"),
    ],
)
def test_positions_that_do_not_rise_are_refused(model, row, positions, message):
    with pytest.raises(ValueError, match=message):
        model(row, positions=positions)


def test_positions_are_seen_where_the_model_alone_is_traced(model, row, forward):
    with pytest.raises(ValueError, match="got 0 after 3"):
        nnx.jit(lambda model: model(row, positions=RESTARTED))(model)
    with pytest.raises(ValueError, match="got 0 after 3"):
        model(row, RESTARTED, segment_ids=np.zeros((1, 11), int))
    assert forward(model, row, positions=RESTARTED).shape == (1, 11, 97)  # traced: not seen


def test_positions_of_padding_do_not_count(model, row, forward, relative):
    ids, mask = np.pad(row, ((0, 0), (2, 1))), np.pad(np.ones((1, 11), int), ((0, 0), (2, 1)))
    positions = np.concatenate([[1, 1], np.arange(11), [1]])[None]
    logits = model(ids, positions, mask)
    assert relative(logits[:, 2:-1], forward(model, row)) < 2e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_ids": SEGMENTS[:, :5]}, r"segment_ids must be \(1, 11\) .* got \(1, 5\)"),
        ({"segment_ids": SEGMENTS[0]}, r"segment_ids must be \(1, 11\) .* got \(11,\)"),
        ({"segment_ids": SEGMENTS * 1.0}, "segment_ids must be integers, got float64"),
        ({"segment_ids": SEGMENTS == 0}, "segment_ids must be integers, got bool"),
        ({"segment_ids": SEGMENTS * 2**32}, "segment_ids must be int32, got 8589934592"),
        ({"attention_mask": SEGMENTS}, "attention_mask must be 0 or 1, got 2; segment_ids"),
        ({"attention_mask": -np.ones((1, 11), int)}, "attention_mask must be 0 or 1, got -1"),
        (
            {"attention_mask": np.zeros((1, 11))},
            "attention_mask must be integers or bool, got float64",
        ),
        ({"attention_mask": np.ones((1, 1, 11, 11), bool)}, r"attention_mask must be \(1, 11\)"),
    ],
)
def test_bad_arguments_are_named(model, row, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(row, **arguments)


def test_one_row_of_arguments_serves_all_rows(model, input_ids, config, forward):
    both = np.concatenate([SEGMENTS, SEGMENTS])
    np.testing.assert_array_equal(
        forward(model, input_ids, segment_ids=SEGMENTS), forward(model, input_ids, segment_ids=both)
    )
    cache = KVCache.empty(model.stacks, batch=2, capacity=11, dtype=jnp.float32)
    mask = np.array([[0] * 3 + [1] * 8])
    _, cache = model.hidden_states(input_ids, attention_mask=mask, cache=cache)
    np.testing.assert_array_equal(cache.mask, np.concatenate([mask, mask]) == 1)


def test_a_cache_holds_one_document_a_row(model, config, row):
    cache = KVCache.empty(model.stacks, batch=1, capacity=16, dtype=jnp.float32)
    with pytest.raises(ValueError, match="segment_ids must be None with a cache"):
        model.hidden_states(row, cache=cache, segment_ids=SEGMENTS)
    _, cache = model.hidden_states(row[:, :5], cache=cache)
    with pytest.raises(ValueError, match="at least 5, the number of tokens in the cache, got 0"):
        model.hidden_states(row[:, 5:], np.arange(6)[None], cache=cache)
    with pytest.raises(ValueError, match="got 0 after 3"):
        jax.jit(lambda cache: model.hidden_states(row, RESTARTED, cache=cache))(cache)
    later = model.hidden_states(row[:, 5:], np.arange(5, 11)[None], cache=cache)[0]
    np.testing.assert_array_equal(later, model.hidden_states(row[:, 5:], cache=cache)[0])
