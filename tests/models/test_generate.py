"""Generation equals the naive loop, stops and pads, draws as asked, and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax.models.llama
from q4jax.models import generate


def naive(model, ids, steps, forward):
    """Runs the whole text for each token; what lies to the right of it does not count."""
    start = ids.shape[1]
    ids = jnp.pad(ids, ((0, 0), (0, steps)))
    for end in range(start, start + steps):
        chosen = jnp.argmax(forward(model, ids)[:, end - 1], axis=-1)
        ids = ids.at[:, end].set(chosen)
    return ids


def test_greedy_equals_the_naive_loop(model, input_ids, forward):
    out = generate(model, input_ids, 9)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, naive(model, input_ids, 9, forward))


def test_left_padding_does_not_change_the_continuation(model, input_ids):
    ids = jnp.pad(input_ids, ((0, 0), (3, 0)))
    mask = jnp.pad(jnp.ones_like(input_ids), ((0, 0), (3, 0)))
    out = generate(model, ids, 9, attention_mask=mask)
    np.testing.assert_array_equal(out[:, 3:], generate(model, input_ids, 9))


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stopped_row_is_padded(model, input_ids, as_list):
    free = np.asarray(generate(model, input_ids, 9))
    stop = int(free[0, 13])
    out = generate(
        model, input_ids, 9, eos_token_id=[stop, 96] if as_list else stop, pad_token_id=5
    )
    for row, expected in zip(np.asarray(out), free, strict=True):
        ends = np.flatnonzero(np.isin(expected[11:], [stop, 96] if as_list else [stop]))
        end = 11 + ends[0] + 1 if ends.size else expected.size
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert (row[end:] == 5).all()


def test_padding_defaults_to_the_stop_token(model, input_ids):
    stop = int(generate(model, input_ids, 1)[0, -1])
    assert (generate(model, input_ids, 4, eos_token_id=stop)[0, 11:] == stop).all()


def test_zero_new_tokens(model, input_ids):
    np.testing.assert_array_equal(generate(model, input_ids, 0), input_ids)


def drawn(model, prompt, **how):
    """The first new token of 400 draws."""
    prompts = jnp.tile(prompt[:1], (400, 1))
    return np.asarray(generate(model, prompts, 1, rng=jax.random.key(3), **how))[:, -1]


def test_draws_follow_the_softmax(model, input_ids, forward):
    probability = np.asarray(jax.nn.softmax(forward(model, input_ids)[0, -1] / 2.0))
    share = np.bincount(drawn(model, input_ids, temperature=2.0), minlength=97) / 400
    assert np.abs(share - probability).max() < 4 * np.sqrt(0.25 / 400)
    assert len(set(drawn(model, input_ids, temperature=2.0))) > 10


def test_top_k_and_top_p_draw_from_the_likeliest(model, input_ids, forward):
    order = np.argsort(-np.asarray(forward(model, input_ids)[0, -1]))
    assert set(drawn(model, input_ids, temperature=5.0, top_k=3)) == set(order[:3])
    assert set(drawn(model, input_ids, temperature=5.0, top_p=1e-6)) == {order[0]}
    probability = np.asarray(jax.nn.softmax(forward(model, input_ids)[0, -1]))[order]
    count = int(np.searchsorted(np.cumsum(probability), 0.5)) + 1
    assert set(drawn(model, input_ids, temperature=1.0, top_p=0.5)) <= set(order[:count])


def test_draws_repeat_with_the_key(model, input_ids):
    one, same, other = (
        generate(model, input_ids, 9, temperature=1.0, rng=jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_traced_twice_for_any_number_of_tokens(model, input_ids, monkeypatch):
    traces = []
    original = q4jax.models.llama.Llama.hidden_states

    def counted(self, ids, *args, **kwargs):
        traces.append(ids.shape)
        return original(self, ids, *args, **kwargs)

    monkeypatch.setattr(q4jax.models.llama.Llama, "hidden_states", counted)
    generate(model, input_ids, 17)
    assert set(traces) == {(2, 11), (2, 1)}
    seen = len(traces)
    generate(model, input_ids + 1, 17)
    assert len(traces) == seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature .* -1.0"),
        ({"temperature": 1.0}, "temperature=1.0 .* rng"),
        ({"temperature": 1.0, "top_k": 0}, "top_k .* got 0"),
        ({"temperature": 1.0, "top_k": 98}, "top_k .* vocab_size=97, got 98"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p .* got 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens .* -1"),
        ({"max_new_tokens": 54}, "max_new_tokens=54: 65 .* context of 64"),
        ({"input_ids": jnp.zeros((2, 0), int)}, "input_ids .*2, 0"),
        ({"input_ids": jnp.zeros(3, int)}, "input_ids .*3,"),
        ({"input_ids": jnp.zeros((2, 3))}, "input_ids .* float32"),
        ({"attention_mask": jnp.ones((2, 3))}, "attention_mask .*2, 3"),
    ],
)
def test_bad_arguments_are_named(model, input_ids, change, message):
    arguments = {"input_ids": input_ids, "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)
