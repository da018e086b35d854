"""Attention in blocks: equal to the whole one for every mask, and without the scores in memory."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from q4jax.models import Llama, LlamaConfig, generate
from q4jax.models.decoder import reach as module
from q4jax.models.decoder.attention import attend
from q4jax.models.decoder.context import _pairs, _ring_pairs
from q4jax.models.decoder.mixer_spec import Attention, View
from q4jax.models.decoder.reach import Reach
from q4jax.models.decoder.sequences import Sequences
from tests.support.optimizations import optimizations

ROWS, TOKENS, HEADS, KV_HEADS, DIM = 2, 37, 4, 2, 8
SPEC = Attention(HEADS, KV_HEADS, DIM, scale=0.3)
SEGMENTS = np.repeat([[0, 1, 0, 2]], [9, 11, 6, 11], axis=1).repeat(ROWS, 0)
REAL = np.arange(TOKENS)[None] >= np.array([[0], [5]])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 queries and 8 keys, so that the sizes do not divide."""
    monkeypatch.setattr(module, "_SMALLEST", 4)
    monkeypatch.setattr(module, "_PAIRS", 1)


def inputs(keys=TOKENS, value_dim=DIM, kv_heads=KV_HEADS, dtype=jnp.float32):
    names = jax.random.split(jax.random.key(1), 5)
    shapes = {
        "q": (ROWS, TOKENS, HEADS, DIM),
        "k": (ROWS, keys, kv_heads, DIM),
        "v": (ROWS, keys, kv_heads, value_dim),
        "sinks": (HEADS,),
        "g": (ROWS, TOKENS, HEADS, value_dim),
    }
    return {
        name: jax.random.normal(key, shape, dtype)
        for (name, shape), key in zip(shapes.items(), names, strict=True)
    }


def pairs_of(**arguments):
    given = {"positions": None, "attention_mask": None, "segment_ids": None, "cache": None}
    sequences, _ = Sequences.from_arguments((ROWS, TOKENS), **{**given, **arguments})
    return _pairs(sequences, sequences.ranks)


def both(spec, pairs, arrays, sinks=False, real=None):
    """(value, gradients) of the whole attention and of that in blocks."""
    found = []
    g = arrays["g"] if real is None else arrays["g"] * real[:, :, None, None]
    names = ["q", "k", "v", *(["sinks"] if sinks else [])]
    for attention in ("whole", "blocks"):
        reach = Reach.of(pairs, spec.view, attention)
        assert (reach.blocks is None) == (attention == "whole")
        context = SimpleNamespace(reach=lambda spec, reach=reach: reach)

        def run(*given, context=context):
            return attend(spec, context, *given)

        y, pull = jax.vjp(jax.jit(run), *(arrays[name] for name in names))
        found.append(((y * (g != 0)), pull(g.astype(y.dtype))))
    return found


def assert_close(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


VIEWS = {"all": View(), "window": View(window=5), "chunk": View(chunk=7)}
KINDS = {
    "plain": {},
    "capped": {"cap": 2.0},
    "alibi": {"alibi": (0.5, 0.25, 0.1, 0.05)},
    "sinks": {"sinks": True},
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("tokens", ["one document", "padding", "documents"])
def test_masks(view, tokens):
    given = {
        "one document": {},
        "padding": {"attention_mask": REAL},
        "documents": {"segment_ids": SEGMENTS},
    }[tokens]
    spec = dataclasses.replace(SPEC, view=VIEWS[view])
    real = REAL if tokens == "padding" else None
    whole, blocks = both(spec, pairs_of(**given), inputs(), real=real)
    assert_close(blocks, whole, 2e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_kinds_of_scores(kind, dtype, tolerance):
    spec = dataclasses.replace(SPEC, view=View(window=9), **KINDS[kind])
    whole, blocks = both(spec, pairs_of(), inputs(dtype=dtype), sinks=kind == "sinks")
    assert_close(blocks, whole, tolerance)


@pytest.mark.usefixtures("small_blocks")
def test_values_of_another_width_and_a_head_for_each_query():
    arrays = inputs(value_dim=5, kv_heads=HEADS)
    whole, blocks = both(dataclasses.replace(SPEC, kv_heads=HEADS), pairs_of(), arrays)
    assert_close(blocks, whole, 2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_a_ring_and_new_tokens():
    """The keys of a ring do not lie in the order of their tokens."""
    ring = jnp.array([[16, 17, 10, 11, 12, 13, 14, 15], [-1] * 8])
    own = jnp.arange(TOKENS)[None] + jnp.array([[18], [0]])
    pairs = _ring_pairs(ring, own, jnp.ones((ROWS, TOKENS), bool))
    spec = dataclasses.replace(SPEC, view=View(window=8))
    whole, blocks = both(spec, pairs, inputs(keys=TOKENS + 8))
    assert_close(blocks, whole, 2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_only_blocks_with_pairs_are_computed():
    assert np.array_equal(
        Reach.of(pairs_of(), View(), "blocks").blocks.needed, np.tril(np.ones((5, 5), bool))
    )
    near = Reach.of(pairs_of(), View(window=8), "blocks").blocks.needed
    assert np.array_equal(near, np.tril(np.ones((5, 5), bool)) & ~np.tri(5, k=-2, dtype=bool))


def test_long_texts_are_computed_in_blocks():
    config = LlamaConfig(97, 32, 48, 1, 4, 2, 8, max_position_embeddings=4096)
    model = Llama(config, rngs=nnx.Rngs(0))
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    documents = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def measured():
        def loss(model, ids, documents):
            return model.loss(ids, segment_ids=documents)

        with optimizations(few=False):
            compiled = nnx.jit(nnx.grad(loss)).lower(model, ids, documents).compile()
        shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        return largest, compiled.memory_analysis().temp_size_in_bytes

    largest, temporary = measured()
    assert largest <= 4 * 512 * 512  # a block of the scores of four heads
    model.attention = "whole"
    largest, whole = measured()
    assert largest >= 4 * 2048 * 2048
    assert temporary < whole / 5


def test_generation_of_a_long_prompt_is_that_of_the_whole_attention(monkeypatch):
    config = LlamaConfig(97, 32, 48, 2, 4, 2, 8, max_position_embeddings=64, sliding_window=12)
    model = Llama(config, rngs=nnx.Rngs(0))
    prompts = [list(range(1, 30)), list(range(40, 60))]
    expected = generate(model, prompts, 5)
    model.attention = "blocks"
    np.testing.assert_array_equal(generate(model, prompts, 5), expected)
    model.attention = "whole"
    monkeypatch.setattr(module, "_LONG", 1)  # no longer asked
    np.testing.assert_array_equal(generate(model, prompts, 5), expected)


def test_an_unknown_form_is_an_error():
    config = LlamaConfig(97, 32, 48, 1, 4, 2, 8)
    model = Llama(config, attention="flash", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="attention must be one of .*, got 'flash'"):
        model(jnp.ones((1, 3), int))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", ["gpt_oss", "gemma2", "bloom", "deepseek_v3", "llama4_text"])
def test_families_compute_the_same_in_blocks(loaded, forward, case):
    """Sinks, caps with windows, ALiBi, latent attention and chunks, with padding on the left."""
    _, model, _ = loaded(case)
    ids = jax.random.randint(jax.random.key(0), (2, 21), 0, model.config.vocab_size)
    real = jnp.arange(21)[None] >= jnp.array([[0], [4]])
    try:
        whole = forward(model, ids, attention_mask=real)
        model.attention = "blocks"
        blocks = forward(model, ids, attention_mask=real)
    finally:
        model.attention = None
    assert_close(blocks * real[..., None], whole * real[..., None], 1e-5)
