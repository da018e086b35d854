"""Every architecture: transformers' logits, greedy tokens and directories."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from q4jax.models import from_pretrained, from_state_dict, generate, save_pretrained
from tests.support.random_weights import CASES, logits_of

# Softmax of products without a scale, and recurrences, let rounding grow.
LIMITS = dict.fromkeys(("gemma4_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 3e-5)

# Among them are all kinds of caches.
IN_CORE = (
    *("llama", "mistral", "gemma3", "gemma4_text", "gpt_oss", "deepseek_v3", "qwen3_next"),
    *("mamba2", "bloom", "llama4_text"),
)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_transformers(case, loaded, forward, relative):
    _, model, vectors = loaded(case)
    expected = vectors["logits"][vectors["attention_mask"] == 1]
    assert relative(logits_of(model, vectors, forward), expected) <= LIMITS.get(case, 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case in IN_CORE else pytest.mark.heavy)
        for case in CASES
    ],
)
def test_greedy_tokens_of_transformers(case, loaded):
    _, model, vectors = loaded(case)
    new = vectors["tokens"].shape[1] - vectors["input_ids"].shape[1]
    mask = jnp.asarray(vectors["attention_mask"])
    tokens = generate(model, jnp.asarray(vectors["input_ids"]), new, attention_mask=mask)
    np.testing.assert_array_equal(tokens, vectors["tokens"])


def without(field, value=None):
    def change(config):
        return dataclasses.replace(config, **{field: value})

    return change


def ones(*names):
    def change(model):
        for stack in model.stacks:
            for module in (getattr(model.stack(stack.name).self_attn, name) for name in names):
                module.scale[...] = jnp.ones_like(module.scale[...])

    return change


def zeros(*names):
    def change(model):
        for stack, path in itertools.product(model.stacks, names):
            block, name = path.split(".")
            bias = getattr(getattr(model.stack(stack.name), block), name).bias
            bias[...] = jnp.zeros_like(bias[...])

    return change


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama", without("rope_scaling")),
        ("llama", zeros("self_attn.o_proj")),
        ("llama", zeros("mlp.down_proj")),
        ("llama_linear_tied", without("rope_scaling")),
        ("llama_dynamic", without("rope_scaling")),
        ("mistral", without("sliding_window")),
        ("qwen2", without("rope_scaling")),
        ("qwen2", without("layer_types")),
        ("qwen2", zeros("self_attn.q_proj")),
        ("qwen2", zeros("self_attn.v_proj")),
        ("qwen3", without("rope_scaling")),
        ("qwen3", ones("q_norm")),
        ("qwen3", ones("k_norm")),
        ("mixtral", without("sliding_window")),
        ("qwen2_moe", without("layer_types")),
        ("qwen3_moe", without("sliding_window")),
    ],
)
def test_each_feature_is_in_force(case, change, loaded, forward, relative):
    """The vectors tell a model without the feature from one with it."""
    folder, model, vectors = loaded(case)
    if change.__qualname__.startswith("without"):
        model = from_state_dict(change(model.config), load_file(folder / "model.safetensors"))
    else:
        model = nnx.clone(model)
        change(model)
    expected = vectors["logits"][vectors["attention_mask"] == 1]
    assert relative(logits_of(model, vectors, forward), expected) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_written_directory_is_the_one_read(case, loaded, tmp_path):
    folder, model, _ = loaded(case)
    save_pretrained(model, tmp_path)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
    assert from_pretrained(tmp_path).config == model.config
    written, read = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    for key in ("architectures", "model_type", "sliding_window", "layer_types"):
        assert (written.get(key) or None) == (read.get(key) or None), key
    rope = read.get("rope_parameters") or {}
    assert rope.items() <= (written.get("rope_parameters") or {}).items()


def test_a_config_that_its_model_type_cannot_say_is_not_written(loaded, tmp_path):
    _, model, _ = loaded("qwen3")
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, model_type="llama")
    with pytest.raises(ValueError, match="model_type 'llama' cannot describe .'qk_norm'."):
        save_pretrained(model, tmp_path)
