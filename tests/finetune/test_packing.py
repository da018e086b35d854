"""Packing loses nothing, documents of a row never see each other, and batches are exact."""

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from q4jax.finetune import Batches, Rows, Tokens, evaluate, loss, pack
from q4jax.models import Llama, LlamaConfig

CONFIG = LlamaConfig(64, 32, 48, 2, 4, 4, 8)

jitted = nnx.jit(lambda model, arrays: loss(model, **arrays))


def measure(model, rows):
    """The loss of all rows."""
    return float(jitted(model, rows.take(slice(None))))


@given(
    sizes=st.lists(st.integers(0, 40), max_size=30),
    length=st.integers(1, 16),
    seed=st.integers(0, 9),
)
def test_every_learned_pair_is_packed_once(sizes, length, seed):
    rng = np.random.default_rng(seed)
    documents = [
        Tokens(rng.integers(1, 64, n).astype(np.int32), rng.random(n) < 0.7) for n in sizes
    ]
    rows = pack(documents, length)
    expected = sorted(
        (int(a), int(b))
        for ids, learned in documents
        for a, b, counts in zip(ids, ids[1:], learned[1:], strict=False)
        if counts
    )
    at = rows.weights == 1
    found = sorted(zip(rows.inputs[at].tolist(), rows.targets[at].tolist(), strict=True))
    assert found == expected
    assert rows.learned == len(expected)
    assert not rows.inputs[rows.segments == 0].any()
    assert set(np.unique(rows.weights)) <= {0.0, 1.0}
    # Documents follow each other in a row, and within one, each target is the next input.
    for row in range(len(rows)):
        segments = rows.segments[row]
        used = segments[segments > 0]
        assert segments[: used.size].tolist() == used.tolist()
        assert set(np.diff(used)) <= {0, 1}
        same = segments[1:] == segments[:-1]
        real = same & (segments[1:] > 0)
        assert (rows.inputs[row][1:][real] == rows.targets[row][:-1][real]).all()


def test_short_documents_fill_rows():
    """Sizes whose best packing is known: pairs fill three rows of eight."""
    sizes = [6, 6, 5, 3, 2, 2]
    documents = [Tokens(np.arange(n + 1), np.ones(n + 1, bool)) for n in sizes]
    rows = pack(documents, 8)
    assert (len(rows), rows.padding) == (3, 0.0)


def test_a_packed_loss_is_that_of_the_documents_alone():
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    documents = [
        Tokens(rng.integers(0, 64, n).astype(np.int32), np.append(rng.random(n - 1) < 0.6, True))
        for n in (5, 9, 3, 12)
    ]
    rows = pack(documents, 16)
    assert not rows.alone
    alone = sum(measure(model, pack([document], 16)) for document in documents)
    assert measure(model, rows) == pytest.approx(alone, rel=1e-5)
    assert evaluate(model, rows, batch=2) == pytest.approx(alone / rows.learned, rel=1e-5)
    mixed = {name: a for name, a in rows.take(slice(None)).items() if name != "segments"}
    assert abs(float(jitted(model, mixed)) - alone) > 0.01


def test_a_gradient_does_not_cross_documents():
    """Of the first document's loss, with respect to the embedding of the second's tokens."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    first, second = np.arange(1, 6), np.arange(20, 26)
    rows = pack([Tokens(ids, np.ones(ids.size, bool)) for ids in (first, second)], 16)
    arrays = rows.take(slice(None))
    only = int(rows.segments[rows.inputs == 1][0])
    arrays["weights"] = (rows.segments == only).astype(np.float32)
    grads = nnx.jit(nnx.grad(lambda model, arrays: loss(model, **arrays)))(model, arrays)
    touched = np.flatnonzero(np.abs(grads.embed_tokens.embedding[...]).sum(axis=1))
    assert touched.tolist() == first[:-1].tolist()


def test_rows_of_one_document_need_no_segments():
    tokens = Tokens(np.arange(1, 31, dtype=np.int32), np.ones(30, bool))
    rows = pack([tokens], 8)
    assert rows.alone
    assert sorted(rows.take([0])) == ["inputs", "targets", "weights"]
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    segments = {**rows.take(slice(None)), "segments": rows.segments}
    assert measure(model, rows) == pytest.approx(float(jitted(model, segments)), rel=1e-5)


def numbered(count):
    return Rows(*(np.arange(count)[:, None] + np.zeros((1, 4), np.int32) for _ in range(4)))


def test_batches_are_fixed_by_seed_and_step():
    batches = Batches(numbered(10), 4, 2, seed=3)
    assert batches.step(1)["inputs"].shape == (2, 2, 4)
    steps = [batches.step(number)["inputs"][..., 0].ravel() for number in range(1, 11)]
    again = Batches(numbered(10), 4, 1, seed=3)
    for number, rows in enumerate(steps, start=1):  # in whatever parts, from whatever step
        np.testing.assert_array_equal(again.step(number)["inputs"][..., 0].ravel(), rows)
    epochs = np.concatenate(steps).reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = Batches(numbered(10), 4, 2, seed=4)
    assert other.step(1)["inputs"].tolist() != batches.step(1)["inputs"].tolist()


def test_a_batch_may_be_larger_than_the_data():
    found = Batches(numbered(3), 8, 1, seed=0).step(1)["inputs"][0, :, 0]
    assert np.bincount(found, minlength=3).min() >= 2
