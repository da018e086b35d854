"""Cross-entropy in blocks: equal to the plain one, and without the logits of all tokens."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import q4jax
from q4jax.lora.adapter import LoRAEmbedding4bit, LoRALinear4bit
from q4jax.models import Llama, LlamaConfig, cross_entropy
from q4jax.models.decoder.head import join_parts, place_of, take_part
from tests.support.optimizations import optimizations

ROWS, TOKENS, FEATURES, VOCAB = 2, 37, 64, 2048
SIZES = LlamaConfig(VOCAB, FEATURES, 48, 1, 4, 2, 16)
ENTRIES = {
    "vocab_size": VOCAB,
    "hidden_size": FEATURES,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GEMMA = {
    **ENTRIES,
    "model_type": "gemma2",
    "sliding_window": 6,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
COHERE = {**ENTRIES, "model_type": "cohere", "logit_scale": 0.25}
PHI = {**ENTRIES, "model_type": "phi", "num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Two parts of the vocabulary and several blocks of tokens, also of these small arrays."""
    monkeypatch.setattr("q4jax.models.decoder.token_losses.WIDEST", 1024)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 5)
    labels = jax.random.randint(keys[3], (ROWS, TOKENS), 0, VOCAB)
    return {
        "x": jax.random.normal(keys[0], (ROWS, TOKENS, FEATURES)),
        "w": jax.random.normal(keys[1], (VOCAB, FEATURES)) / 4,
        "b": jax.random.normal(keys[2], (VOCAB,)),
        "labels": labels.at[0, :5].set(-100),
        "g": jax.random.normal(keys[4], (ROWS, TOKENS)),
    }


CLOSE = 5e-6  # of float32 sums of some hundred terms, whose order depends on the processor


def plain(logits, labels, scale=1.0, cap=None):
    y = logits.astype(jnp.float32) * scale
    y = y if cap is None else jnp.tanh(y / cap) * cap
    found = optax.softmax_cross_entropy_with_integer_labels(y, jnp.maximum(labels, 0))
    return jnp.where(labels >= 0, found, 0)


def assert_close(ours, theirs, tolerance):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize(
    ("block", "settings"),
    [(16, {}), (1, {"scale": 0.5, "cap": 3.0}), (4096, {"scale": 0.5, "cap": 3.0})],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", CLOSE), ("bfloat16", 1e-2)])
def test_values_and_gradients(arrays, dtype, tolerance, block, settings):
    inputs = [arrays[name].astype(dtype) for name in "xwb"]
    labels = arrays["labels"]

    def theirs(x, w, b):
        return plain(x @ w.T + b, labels, **settings)

    def ours(x, w, b):
        return cross_entropy(x, w, labels, bias=b, block=block, **settings)

    expected, pull = jax.vjp(theirs, *inputs)
    found, own = jax.vjp(jax.jit(ours), *inputs)
    assert_close(found, expected, tolerance)
    assert found.dtype == jnp.float32
    assert not np.asarray(found[0, :5]).any()
    assert_close(own(arrays["g"]), pull(arrays["g"]), tolerance)
    assert [d.dtype for d in own(arrays["g"])] == [dtype] * 3


@pytest.mark.parametrize("blocksize", [32, 4096])  # the second does not divide rows: one part
def test_a_4_bit_head_has_a_gradient_to_hidden_states_only(arrays, blocksize):
    weight = q4jax.Params4bit.quantize(arrays["w"], blocksize, quant_type="nf4")
    labels, g = arrays["labels"], arrays["g"]
    expected, pull = jax.vjp(lambda x: plain(x @ weight.dequantize().T, labels), arrays["x"])
    found, own = jax.vjp(lambda x: cross_entropy(x, weight, labels, block=16), arrays["x"])
    assert_close(found, expected, CLOSE)
    assert_close(own(g), pull(g), CLOSE)


def test_a_confident_prediction_keeps_its_small_gradient(arrays):
    """p - 1 of a label with p near 1 is lost where p is rounded to bfloat16 first."""
    weight = q4jax.Params4bit.quantize(arrays["w"], 64, quant_type="nf4")
    rows = weight.dequantize()
    labels = arrays["labels"] % VOCAB
    x = (8 * rows[labels]).astype(jnp.bfloat16)

    def exact(x):
        return plain(x.astype(jnp.float32) @ rows.T, labels)

    expected = jax.vjp(exact, x.astype(jnp.float32))[1](arrays["g"])[0]
    found = jax.vjp(lambda x: cross_entropy(x, weight, labels), x)[1](arrays["g"])[0]
    assert np.abs(expected).max() < 1e-3
    assert_close(found, expected, 0.2)  # logits near 32 are rounded by up to 0.06


def test_extreme_logits_are_finite(arrays):
    x = 1e4 * arrays["x"]
    labels = arrays["labels"]
    found, pull = jax.vjp(lambda x: cross_entropy(x, arrays["w"], labels), x)
    assert_close(found, plain(x @ arrays["w"].T, labels), CLOSE)
    assert np.isfinite(pull(arrays["g"])[0]).all()


def test_labels_beyond_the_vocabulary_are_nan(arrays):
    labels = arrays["labels"].at[1, 3].set(VOCAB)
    found = np.isnan(jax.jit(cross_entropy)(arrays["x"], arrays["w"], labels))
    assert found[1, 3] and found.sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.ones((1, 3, 5))}, "hidden must be [..., T, 64], got [1, 3, 5]"),
        ({"labels": jnp.ones((2, 36), int)}, "labels must be int [2, 37], got"),
        ({"labels": jnp.ones((2, 37))}, "labels must be int [2, 37], got float32"),
        ({"bias": jnp.ones(3)}, "bias must be [2048], got [3]"),
        ({"block": 0}, "block must be at least 1, got 0"),
    ],
)
def test_errors(arrays, change, message):
    given = {"hidden": arrays["x"], "head": arrays["w"], "labels": arrays["labels"]}
    with pytest.raises(ValueError, match=re.escape(message)):
        cross_entropy(**{**given, **change})


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_hold_each_token_once(parts):
    tokens = jnp.arange(VOCAB)
    taken = jnp.stack([take_part(tokens, jnp.int32(n), parts, 0) for n in range(parts)])
    assert (join_parts(taken, 0) == tokens).all()
    own, place = place_of(tokens, VOCAB, parts)
    assert (taken[own, place] == tokens).all()


HEADS = {
    "dense": {},
    "4-bit": {"quantized": "lm_head"},
    "adapter": {"adapter": {}},
    "4-bit with an adapter": {"quantized": "lm_head", "adapter": {}},
    "DoRA": {"adapter": {"dora": True}},
    "tied": {"tied": True},
    "tied 4-bit": {"tied": True, "quantized": "embed_tokens"},
    "tied with an adapter": {"tied": True, "adapter": {}},
    "capped": {"entries": GEMMA},
    "scaled": {"entries": COHERE},
    "tied with a bias": {"entries": PHI, "bias": True},
}


def make(entries=None, tied=False, quantized=None, adapter=None, bias=False):
    config = dataclasses.replace(SIZES, tie_word_embeddings=tied)
    if entries is not None:
        config = LlamaConfig.from_hf(entries)
    model = Llama(config, rngs=nnx.Rngs(1))
    if bias:
        model.lm_head.bias[...] = jax.random.normal(jax.random.key(7), (VOCAB,))
    if quantized:
        model = q4jax.quantize_model(
            model, [q4jax.QuantRule(quantized, blocksize=32, embeddings=True)]
        )
    if adapter is not None:
        name = "embed_tokens" if tied else "lm_head"
        cls = LoRAEmbedding4bit if tied else LoRALinear4bit
        layer = cls(getattr(model, name), 4, 8.0, rngs=nnx.Rngs(2), **adapter)
        for number, variable in enumerate((layer.lora_a, layer.lora_b)):
            variable[...] = jax.random.normal(jax.random.key(number), variable.shape) / 4
        setattr(model, name, layer)
    return model


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_of_models(arrays, name):
    """The losses are those of the model's logits, and so are the gradients to what it trains."""
    model = make(**HEADS[name])
    hidden, labels, g = (arrays[key] for key in ("x", "labels", "g"))

    def theirs(model, hidden):
        return (plain(model.logits(hidden), labels) * g).sum()

    def ours(model, hidden):
        return (model.losses(hidden, labels, block=16) * g).sum()

    def run(loss):
        return nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(model, hidden)

    (expected, theirs), (found, own) = map(run, (theirs, ours))
    assert_close(found, expected, CLOSE)
    assert_close(own[1], theirs[1], CLOSE)
    trained = [np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(theirs[0])]
    assert any(trained) == ("4-bit" not in name or "adapter" in name)
    for one, other in zip(*(jax.tree.leaves(d[0]) for d in (own, theirs)), strict=True):
        assert np.abs(one - other).max() <= CLOSE * np.abs(other).max()


def test_the_loss_of_a_model():
    model = make()
    ids = jax.random.randint(jax.random.key(0), (2, 13), 0, VOCAB)
    labels = ids.at[1, :9].set(-100)
    expected = plain(model(ids)[:, :-1], labels[:, 1:]).sum() / (12 + 4)
    assert_close(model.loss(ids, labels), expected, 1e-6)


def test_labels_across_documents_and_at_padding_are_ignored():
    model = make()
    ids = jax.random.randint(jax.random.key(0), (1, 12), 0, VOCAB)
    documents = jnp.array([[0] * 5 + [1] * 7])
    real = jnp.arange(12)[None] < 10
    parts = [ids[:, :5], ids[:, 5:10]]
    losses = [model.loss(part) * (part.size - 1) for part in parts]
    found = model.loss(ids, attention_mask=real, segment_ids=documents)
    assert_close(found, sum(losses) / 8, 1e-6)
    assert float(model.loss(ids, jnp.full_like(ids, -100))) == 0.0
    with pytest.raises(ValueError, match="labels must be below vocab_size=2048, got 2048"):
        model.loss(ids, ids.at[0, 3].set(VOCAB))
    with pytest.raises(ValueError, match=re.escape("labels must be int [1, 12] as input_ids")):
        model.loss(ids, ids[:, 1:])


@pytest.mark.parametrize("wrt", [0, (0, 1)], ids=["frozen", "trained"])
def test_no_logits_of_all_tokens_are_compiled(wrt):
    tokens, vocab = 4096, 12288
    x = jax.ShapeDtypeStruct((1, tokens, FEATURES), jnp.float32)
    w = jax.ShapeDtypeStruct((vocab, FEATURES), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def total(loss):
        step = jax.jit(jax.value_and_grad(lambda *args: loss(*args).sum(), argnums=wrt))
        with optimizations(few=False):
            compiled = step.lower(x, w, labels).compile()
        shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        return largest, compiled.memory_analysis().temp_size_in_bytes

    largest, temporary = total(lambda x, w, labels: plain(x @ w.T, labels))
    assert largest == tokens * vocab
    assert temporary >= 4 * largest
    largest, temporary = total(cross_entropy)
    assert largest <= 1024 * 1024  # a block
    assert temporary < tokens * vocab
