"""LlamaConfig reads configs of transformers 4 and 5, and names unsupported entries."""

import json
from pathlib import Path

import pytest

from q4jax.models.decoder.config import LlamaConfig, RopeScaling
from tests.support.vectors import GOLDEN

BASE = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GOLDEN_CONFIG = json.loads((GOLDEN / "llama_tiny_bnb4" / "config.json").read_text())
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults_follow_hugging_face():
    config = LlamaConfig.from_hf(BASE)
    assert (config.num_key_value_heads, config.head_dim) == (4, 32)
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-6)
    assert config.rope_scaling is None
    assert not config.tie_word_embeddings


def test_reads_the_rope_of_transformers_4_and_5():
    four = LlamaConfig.from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    five = LlamaConfig.from_hf(BASE | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    assert four == five
    assert four.rope_theta == 5e5
    assert four.rope_scaling == RopeScaling(**LLAMA3)


def test_reads_the_old_name_of_the_rope_type():
    config = LlamaConfig.from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_reads_what_transformers_wrote():
    file = Path(__file__).parents[2] / "golden" / "llama_tiny_bnb4" / "config.json"
    config = LlamaConfig.from_hf(json.loads(file.read_text()))
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 32, 320)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), RopeScaling(**LLAMA3)])
def test_to_hf_round_trip(config, scaling):
    import dataclasses

    config = dataclasses.replace(config, rope_scaling=scaling, mlp_bias=True, rope_theta=5e5)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_type 'ntk'"),
    ],
)
def test_unsupported_features_are_named(change, message):
    with pytest.raises(NotImplementedError, match=message):
        LlamaConfig.from_hf(BASE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 .* num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs .'factor'."),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": YARN | {"rope_theta": 1}}, "rope_theta=1.0 must be above 1 .*'yarn'"),
        ({"rope_theta": 0.5, "rope_scaling": YARN}, "rope_theta=0.5 must be above 1"),
        ({"rope_theta": 1e-46}, "rope_theta must be a positive number"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "factor=1.0 must be above low_freq"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5}}, "high_freq_factor=4.0 .*=5.0"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "head_dim=2 must"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(BASE | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "rwkv"}, NotImplementedError, "'rwkv': .* llama, .* mistral, .* qwen3_moe"),
        ({"model_type": ["llama"]}, NotImplementedError, r"model_type \['llama'\]"),
        ({"model_type": "mistral", "sliding_window": -4}, ValueError, "sliding_window .* got -4"),
        (
            {"model_type": "mixtral", "num_local_experts": 1},
            ValueError,
            "_tok=2 is more than num_experts=1",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 8},
            ValueError,
            "contradicts itself: {'num_local_experts': 8, 'num_experts': 4}",
        ),
        (
            {"model_type": "qwen2_moe", "mlp_only_layers": "1"},
            ValueError,
            "list of integers, got '1'",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            None,
            None,
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]},
            ValueError,
            "layer_types must be 2 times .* 'chunked_attention'",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            ValueError,
            "but sliding_window is None",
        ),
        ({"num_hidden_layers": 2**31 - 1}, ValueError, "at most 10000, got 2147483647"),
        ({"hidden_size": 2, "head_dim": None}, ValueError, "head_dim=0 must be even"),
        ({"model_type": "qwen3", "use_sliding_window": 1}, ValueError, "must be true or false"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": "all"},
            ValueError,
            "max_window_layers must be an integer, got 'all'",
        ),
    ],
)
def test_configs_that_cannot_be_served_are_named(change, error, message):
    config = {k: v for k, v in GOLDEN_CONFIG.items() if k != "quantization_config"} | change
    if error is None:
        assert LlamaConfig.from_hf(config).sliding_window is None
        return
    with pytest.raises(error, match=message):
        LlamaConfig.from_hf(config)
