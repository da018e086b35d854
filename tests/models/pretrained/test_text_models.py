"""What else lies in a model's directory: vision towers, layers for further tokens, other heads."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import q4jax
from q4jax.models import from_pretrained, save_pretrained
from tests.support.random_weights import logits_of, write_directory


def rewrite(folder, rename, extra, change):
    tensors = {
        rename(name): array for name, array in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors | extra, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))


@pytest.mark.parametrize(
    ("kind", "rename"),
    [
        ("llava", lambda name: f"language_model.{name}"),
        ("qwen2_5_vl", lambda name: name.replace("model.", "model.language_model.", 1)),
    ],
)
def test_the_text_model_of_a_vision_language_model(kind, rename, tmp_path, forward, caplog):
    vectors = write_directory("llama", tmp_path / "v")
    alone = from_pretrained(tmp_path / "v")
    extra = {
        "model.visual.blocks.0.attn.qkv.weight": np.ones((4, 4), np.float32),
        "vision_tower.layers.0.mlp.fc1.bias": np.ones(4, np.float32),
        "multi_modal_projector.linear_1.weight": np.ones((4, 4), np.float32),
    }
    rewrite(
        tmp_path / "v",
        rename,
        extra,
        lambda config: {
            "model_type": kind,
            "architectures": ["LlavaForConditionalGeneration"],
            "text_config": config,
            "vision_config": {"hidden_size": 4},
        },
    )
    with caplog.at_level(logging.INFO, logger="q4jax"):
        model = from_pretrained(tmp_path / "v", q4jax.QuantConfig(blocksize=32))
    assert "3 tensors of other parts than the text model are not read" in caplog.text
    dense = q4jax.quantize_model(alone, blocksize=32)
    np.testing.assert_array_equal(
        logits_of(model, vectors, forward), logits_of(dense, vectors, forward)
    )
    save_pretrained(model, tmp_path / "text")
    assert q4jax.fingerprint(from_pretrained(tmp_path / "text")) == q4jax.fingerprint(model)
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "llama"


def test_layers_for_further_tokens_are_not_read(tmp_path, forward):
    vectors = write_directory("deepseek_v3", tmp_path)
    before = logits_of(from_pretrained(tmp_path), vectors, forward)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    extra = {
        f"model.layers.{config['num_hidden_layers']}.eh_proj.weight": np.ones((4, 4), np.float32)
    }
    rewrite(tmp_path, lambda name: name, extra, lambda config: config)
    np.testing.assert_array_equal(logits_of(from_pretrained(tmp_path), vectors, forward), before)
    rewrite(tmp_path, lambda name: name, {}, lambda c: c | {"num_nextn_predict_layers": 0})
    with pytest.raises(ValueError, match=r"tensors unexpected: \['model.layers.2.eh_proj"):
        from_pretrained(tmp_path)


def test_other_heads_are_refused_by_name(tmp_path):
    write_directory("llama", tmp_path)
    heads = {"architectures": ["LlamaForSequenceClassification"]}
    rewrite(tmp_path, lambda name: name, {}, lambda config: config | heads)
    with pytest.raises(NotImplementedError, match="is a LlamaForSequenceClassification"):
        from_pretrained(tmp_path)
