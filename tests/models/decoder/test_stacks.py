"""Layers that differ: how they are grouped, compiled, cached, quantized and adapted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import q4jax
from q4jax.interop import peft
from q4jax.models import Llama, LlamaConfig, generate
from q4jax.models.decoder.kv_cache import KVCache
from q4jax.models.decoder.stacks import group_layers, kinds_of_stacks

SLIDING, FULL = "sliding_attention", "full_attention"


def windowed(layers, pattern, window=6):
    types = tuple(pattern[i % len(pattern)] for i in range(layers))
    return LlamaConfig(
        96, 32, 48, layers, 4, 2, 8, sliding_window=window, layer_types=types,
        max_position_embeddings=128,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", [[(0, 1, 2, 3)]]),
        ("abbb", [[(0,)], [(1, 2, 3)]]),
        ("aabaabaab", [[(0, 1, 3, 4, 6, 7), (2, 5, 8)]]),
        ("aabaabaa", [[(0, 1, 3, 4), (2, 5)], [(6, 7)]]),
        ("abab", [[(0, 2), (1, 3)]]),
        ("abc", [[(0,)], [(1,)], [(2,)]]),
        ("aaab" * 2, [[(0, 1, 2, 4, 5, 6), (3, 7)]]),
    ],
)
def test_layers_are_grouped_by_runs_and_periods(kinds, expected):
    [layer] = set(LlamaConfig(64, 32, 48, 1, 4, 4, 8).decoder.layers)
    groups = group_layers([layer] * len(kinds), kinds)
    assert [[stack.numbers for stack in group] for group in groups] == expected
    names = [stack.name for group in groups for stack in group]
    assert len(set(names)) == len(names)
    assert (names == ["layers"]) == (len(names) == 1)


@settings(max_examples=200)
@given(kinds=st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_kinds_are_found_again_from_stacks(kinds):
    [layer] = set(LlamaConfig(64, 32, 48, 1, 4, 4, 8).decoder.layers)
    groups = group_layers([layer] * len(kinds), kinds)
    sizes = {stack.numbers[0]: len(stack.numbers) for group in groups for stack in group}
    assert group_layers([layer] * len(kinds), kinds_of_stacks(sizes)) == groups


@pytest.mark.parametrize("sizes", [{1: 2}, {0: 2, 3: 1}, {0: 3, 2: 2}, {0: 1, 1: 0}, {0: 5, 2: 2}])
def test_stacks_of_no_model(sizes):
    assert kinds_of_stacks(sizes) is None


def test_the_program_of_a_repeating_pattern_does_not_grow():
    lines = {}
    for layers in (4, 8, 32):
        config = windowed(layers, (SLIDING, SLIDING, SLIDING, FULL))
        graphdef, state = nnx.split(nnx.eval_shape(lambda c=config: Llama(c, rngs=nnx.Rngs(0))))

        def step(state, ids, graphdef=graphdef):
            return nnx.merge(graphdef, state)(ids)

        ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        lowered = jax.jit(step).lower(state, ids)
        lines[layers] = len(lowered.as_text().splitlines())
    assert lines[32] == lines[8] <= 1.3 * lines[4]


@pytest.mark.parametrize(
    "pattern",
    [
        (SLIDING,),
        (SLIDING, FULL),
        pytest.param((FULL, SLIDING, SLIDING) * 2, marks=pytest.mark.heavy),
    ],
)
def test_a_window_keeps_its_tokens_only(pattern, relative):
    """Whatever the padding and the sizes of the steps, tokens see what they see without a cache."""
    config = windowed(len(pattern), pattern)
    model = Llama(config, rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(0), (3, 20), 0, 96)
    mask = np.ones((3, 20), bool)
    mask[1, :7] = mask[2, 15:] = mask[2, 3:5] = False
    expected = model(ids, attention_mask=jnp.asarray(mask))
    cache = KVCache.empty(model.stacks, 3, 24, jnp.float32)
    for stack in model.stacks:
        slots = 6 if stack.layer.mixer.view.window else 24
        assert cache.states[stack.name]["keys"].shape == (len(stack.numbers), 3, slots, 2, 8)
    found = []
    for part in (slice(0, 2), slice(2, 13), slice(13, 14), slice(14, 20)):
        hidden, cache = model.hidden_states(
            ids[:, part], attention_mask=jnp.asarray(mask[:, part]), cache=cache
        )
        found.append(model.logits(hidden))
    assert relative(jnp.concatenate(found, axis=1)[mask], expected[mask]) < 1e-5


@pytest.mark.heavy
def test_generation_with_windows_is_that_of_whole_texts():
    model = Llama(windowed(4, (SLIDING, FULL)), rngs=nnx.Rngs(1))
    prompts = [[5, 9, 2, 44, 7, 3, 8, 1, 17], [3, 1]]
    found = np.asarray(generate(model, prompts, 12))
    for row, prompt in zip(found, prompts, strict=True):
        text = list(prompt)
        for _ in range(12):
            text.append(int(jnp.argmax(model(jnp.asarray([text]))[0, -1])))
        assert row[-12:].tolist() == text[len(prompt) :]


def test_adapters_of_stacks_have_the_numbers_of_their_layers(tmp_path, relative):
    config = dataclasses.replace(windowed(4, (SLIDING, FULL)), hidden_size=64)
    small = q4jax.quantize_model(Llama(config, rngs=nnx.Rngs(0)))
    adapted = q4jax.add_lora(small, rank=2, alpha=4.0, targets=("q_proj", "down_proj"))

    for stack in adapted.stacks:
        for number, layer in enumerate(stack.numbers):
            b = adapted.stack(stack.name).self_attn.q_proj.lora_b
            b[...] = b[...].at[number].set(0.1 * (layer + 1))
    peft.save_adapters(adapted, tmp_path / "adapter")
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for layer in range(4):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight"
        np.testing.assert_allclose(tensors[name], 0.1 * (layer + 1), rtol=1e-6)
    assert len(tensors) == 4 * 2 * 2
    again = peft.load_adapters(small, tmp_path / "adapter")
    ids = jnp.arange(12)[None]
    assert relative(again(ids), adapted(ids)) < 1e-6
    assert relative(again(ids), small(ids)) > 1e-3
