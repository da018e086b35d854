"""Generation equals the naive loop, stops, pads, samples, and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from q4jax.models import Llama, generate
from q4jax.models.decoder.kv_cache import KVCache
from q4jax.models.generation.sampling import Sampling


def naive(model, ids, steps, forward):
    """Generate greedily by running the complete text for each token."""
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
    """Return the first new token of 400 samples."""
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


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45, 1e-46, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}])
def test_a_low_temperature_takes_the_likeliest(model, input_ids, temperature, filters):
    key = jax.random.key(3)
    out = generate(model, input_ids, 6, temperature=temperature, rng=key, **filters)
    np.testing.assert_array_equal(out, generate(model, input_ids, 6))


@pytest.mark.parametrize(
    "filters", [{"top_k": 1}, *({"top_p": p} for p in (1e-6, 1e-38, 1e-45, 1e-46, 5e-324))]
)
@pytest.mark.parametrize("temperature", [1.0, 1e30, 1e300])
def test_the_narrowest_filters_take_the_likeliest(model, input_ids, temperature, filters):
    key = jax.random.key(3)
    out = generate(model, input_ids, 6, temperature=temperature, rng=key, **filters)
    np.testing.assert_array_equal(out, generate(model, input_ids, 6))


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_p": 1.0}, {"top_k": 0, "top_p": 1}])
def test_filters_that_are_off(model, input_ids, off):
    settings = {"temperature": 1.5, "rng": jax.random.key(3)}
    np.testing.assert_array_equal(
        generate(model, input_ids, 6, **settings, **off), generate(model, input_ids, 6, **settings)
    )


def choices(logits, draws=200, **how):
    """Return the tokens drawn from logits `[V]`."""
    method, sampling = Sampling.from_arguments(
        how.get("temperature", 1.0), how.get("top_k"), how.get("top_p"), logits.size
    )
    rows = jnp.tile(jnp.asarray(logits)[None], (draws, 1))
    return set(np.asarray(sampling.choose(method, rows, jax.random.key(0))).tolist())


def test_equal_logits_do_not_widen_a_filter():
    logits = np.array([0.0, 2.0, 2.0, 2.0, 1.0], np.float32)
    assert choices(logits, top_k=2) == {1, 2}
    assert choices(logits, top_p=1e-9) == {1}
    assert choices(logits, top_k=4) == {1, 2, 3, 4}


def test_extreme_logits_are_divided_without_overflow():
    logits = np.array([3e38, 1.0, -3e38, -np.inf], np.float32)
    assert choices(logits, temperature=1e-38) == {0}
    assert choices(logits / 1e38, temperature=1e300) == {0, 1, 2}


def test_top_p_of_one_does_not_compare_rounded_sums():
    assert Sampling.from_arguments(1.0, 5, 1.0, 10)[1].top_p == np.inf


def test_scalars_of_numpy_and_jax(model, input_ids):
    plain = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "eos_token_id": 3, "pad_token_id": 5}
    expected = generate(model, input_ids, 6, rng=jax.random.key(1), **plain)
    for cast in (np.asarray, jnp.asarray, lambda x: np.asarray(x)[()]):
        given = {name: cast(value) for name, value in plain.items()}
        found = generate(model, input_ids, cast(6), rng=jax.random.key(1), **given)
        np.testing.assert_array_equal(found, expected)
    for several in (np.array([3, 96]), jnp.array([3, 96]), {3, 96}, (np.int64(3), np.int8(96))):
        np.testing.assert_array_equal(
            generate(model, input_ids, 6, eos_token_id=several),
            generate(model, input_ids, 6, eos_token_id=[3, 96]),
        )


def test_both_styles_of_random_keys(model, input_ids):
    assert generate(model, input_ids, 2, temperature=1.0, rng=jax.random.PRNGKey(0)).shape == (
        2,
        13,
    )


def test_draws_repeat_with_the_key(model, input_ids):
    one, same, other = (
        generate(model, input_ids, 9, temperature=1.0, rng=jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.fixture
def traces(monkeypatch):
    """Return a list that collects the token shape of each trace of the model."""
    found = []
    original = Llama.hidden_states

    def counted(self, ids, *args, **kwargs):
        found.append(ids.shape)
        return original(self, ids, *args, **kwargs)

    monkeypatch.setattr(Llama, "hidden_states", counted)
    return found


def test_two_programs_serve_lengths_steps_and_settings(model, input_ids, traces):
    generate(model, input_ids, 17)
    assert set(traces) == {(2, 16), (2, 1)}
    seen = len(traces)
    for prompt in (1, 5, 11, 16):
        generate(model, jnp.tile(input_ids, 2)[:, :prompt], 24)
    generate(model, [[1, 2], [3, 4, 5, 6]], 20, eos_token_id=[1, 2, 3], pad_token_id=4)
    generate(model, input_ids, 18, callback=lambda tokens: None)
    assert len(traces) == seen
    for top_k, top_p, temperature in ((3, None, 1.0), (None, 0.5, 2.0), (7, 0.9, 0.5)):
        key = jax.random.key(top_k or 0)
        generate(model, input_ids, 17, temperature=temperature, top_k=top_k, top_p=top_p, rng=key)
    assert len(traces) == 2 * seen
    generate(model, jnp.tile(input_ids, 2)[:, :17], 17)
    assert set(traces[2 * seen :]) == {(2, 24), (2, 1)}


def test_prompts_of_different_lengths_are_as_each_alone(model, input_ids):
    prompts = [input_ids[0].tolist(), input_ids[1, :4].tolist(), [7]]
    together = np.asarray(generate(model, prompts, 6, pad_token_id=3))
    assert together.shape == (3, 11 + 6)
    for row, prompt in zip(together, prompts, strict=True):
        alone = np.asarray(generate(model, [prompt], 6))[0]
        np.testing.assert_array_equal(row[11 - len(prompt) :], alone)
        assert (row[: 11 - len(prompt)] == 3).all()


def test_where_a_prompt_is_padded_does_not_matter(model, input_ids):
    ids = np.zeros((2, 20), int)
    mask = np.zeros_like(ids)
    ids[0, :11], ids[1, 9:] = input_ids[0], input_ids[1]
    mask[0, :11] = mask[1, 9:] = 1
    out = generate(model, ids, 5, attention_mask=mask)
    np.testing.assert_array_equal(out[:, :20], ids)
    np.testing.assert_array_equal(out[:, 20:], generate(model, input_ids, 5)[:, 11:])


def test_the_callback_sees_each_token_once(model, input_ids):
    free = np.asarray(generate(model, input_ids, 9))[:, 11:]
    stop = int(free[0, 2])
    seen = []
    out = generate(model, input_ids, 9, eos_token_id=stop, pad_token_id=5, callback=seen.append)
    new = np.asarray(out)[:, 11:]
    np.testing.assert_array_equal(np.stack(seen, 1), new[:, : len(seen)])
    assert (new[:, len(seen) :] == 5).all()
    seen.clear()
    generate(model, input_ids[:1], 9, eos_token_id=stop, callback=seen.append)
    assert len(seen) == 1 + np.flatnonzero(free[0] == stop)[0]


def test_more_tokens_than_the_cache_holds(model, config, input_ids):
    cache = KVCache.empty(model.stacks, batch=2, capacity=8, dtype=jnp.float32)
    with pytest.raises(ValueError, match="11 tokens do not fit into a cache of 8 slots, 0 of them"):
        model.hidden_states(input_ids, cache=cache)
    _, cache = model.hidden_states(input_ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match="4 tokens do not fit .* 8 slots, 5 of them filled"):
        model.hidden_states(input_ids[:, :4], cache=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature .* -1.0"),
        ({"temperature": 1.0}, "temperature=1.0 .* rng"),
        ({"temperature": 1.0, "top_k": -1}, "top_k .* got -1"),
        ({"temperature": 1.0, "top_k": 2.0}, "top_k must be an integer from 0 .*, got 2.0"),
        ({"temperature": 1.0, "top_k": True}, "top_k must be an integer .*, got True"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": np.float32(np.inf)}, "temperature must be .* finite, got inf"),
        ({"temperature": 10**400}, "temperature must be a number, got 1000"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": jnp.ones(1)}, "temperature must be a number, got Array"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, got nan"),
        ({"top_p": np.float16(1.5)}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"rng": 0}, "rng must be one JAX random key.*, got 0"),
        ({"rng": jax.random.split(jax.random.key(0))}, "rng must be one JAX random key"),
        ({"rng": nnx.Rngs(0)}, "rng must be one JAX random key"),
        ({"callback": 3}, "callback must be a function or None, got 3"),
        ({"eos_token_id": 1.0}, "eos_token_id must be an integer from 0 .*, got 1.0"),
        ({"eos_token_id": [1, 2.5]}, "eos_token_id must be an integer .*, got 2.5"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer .*, got '<'"),
        ({"eos_token_id": np.array([5, 97])}, "eos_token_id must be from 0 to .*=96, got 97"),
        ({"pad_token_id": 1.5}, "pad_token_id must be an integer .*, got 1.5"),
        ({"max_new_tokens": 4.0}, "max_new_tokens must be an integer at least 0, got 4.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer .*, got True"),
        ({"max_new_tokens": 10**30}, "context of 64"),
        ({"attention_mask": jnp.ones((2, 11))}, "attention_mask must be integers .*float32"),
        ({"attention_mask": jnp.full((2, 11), 2)}, "attention_mask must be 0 or 1, got 2"),
        ({"input_ids": [[1, None]]}, "input_ids must be integers, got object"),
        ({"input_ids": [[True]]}, "input_ids must be integers, got bool"),
        ({"temperature": 1.0, "top_k": 98}, "top_k .* vocab_size=97, got 98"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p .* got 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens .* -1"),
        ({"max_new_tokens": 54}, "prompt has 11 .* max_new_tokens=54: 65 .* context of 64"),
        ({"input_ids": [[1] * 70]}, "prompt has 70 tokens .* context of 64"),
        ({"input_ids": jnp.zeros((2, 0), int)}, "prompt 0 of input_ids has no tokens"),
        ({"input_ids": jnp.zeros((0, 2), int)}, "input_ids must hold a prompt, got .0, 2."),
        ({"input_ids": [[1, 2], []]}, "prompt 1 of input_ids has no tokens"),
        ({"input_ids": []}, "input_ids must be a list of lists"),
        ({"input_ids": [1, 2]}, "input_ids must be a list of lists"),
        ({"input_ids": [[1.5]]}, "input_ids must be integers, got float64"),
        ({"input_ids": [[1], [5, 97]]}, "prompt 1 must be from 0 to .*=96, got 97"),
        ({"input_ids": jnp.array([[3, -1]])}, "prompt 0 must be from 0 to .*=96, got -1"),
        ({"input_ids": [[1]], "attention_mask": jnp.ones((1, 1))}, "must be None for a list"),
        ({"eos_token_id": [5, 97]}, "eos_token_id must be from 0 to .*=96, got 97"),
        ({"pad_token_id": -1}, "pad_token_id must be from 0 to .*=96, got -1"),
        ({"input_ids": jnp.zeros(3, int)}, "input_ids .*3,"),
        ({"input_ids": jnp.zeros((2, 3))}, "input_ids .* float32"),
        ({"attention_mask": jnp.ones((2, 3))}, "attention_mask .*2, 3"),
    ],
)
def test_bad_arguments_are_named(model, input_ids, change, message):
    arguments = {"input_ids": input_ids, "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_another_model_is_refused(input_ids):
    with pytest.raises(TypeError, match="model must be a q4jax.models.Llama, got Linear"):
        generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), input_ids, 1)


def test_tokens_out_of_range_are_named_by_the_model(model):
    with pytest.raises(ValueError, match="input_ids must be from 0 to vocab_size-1=96, got 97"):
        model(jnp.array([[1, 97]]))
