"""`convert` of checkpoints of whole models, whose layers are stacked."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax import checkpoint
from q4jax.interop import bitsandbytes
from q4jax.models import Llama, LlamaConfig, from_pretrained, save_pretrained

CONFIG = LlamaConfig(64, 64, 64, 2, 2, 2, 32)


@pytest.fixture(scope="module")
def dense():
    return Llama(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)


@pytest.fixture(scope="module")
def quantized(dense):
    return q4jax.quantize_model(dense, quant_type="fp4", blocksize=32, skip=("lm_head", "v_proj"))


@pytest.fixture(scope="module")
def adapted(quantized):
    model = q4jax.add_lora(
        quantized, 2, 6.0, targets=("q_proj", "v_proj"), rslora=True, dropout=0.1
    )
    for number, name in enumerate(("q_proj", "v_proj")):
        b = getattr(model.layers.self_attn, name).lora_b
        b[...] = jax.random.normal(jax.random.key(number), b.shape)
    return model


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG.to_hf()))
    return file


def written(folder):
    return (folder / "model.safetensors").read_bytes(), json.loads(
        (folder / "config.json").read_text()
    )


@pytest.mark.parametrize("name", ["dense", "quantized"])
def test_a_model_becomes_what_save_pretrained_writes(run, request, tmp_path, config, name):
    model = request.getfixturevalue(name)
    checkpoint.save(tmp_path / "c", model)
    save_pretrained(model, tmp_path / "expected")
    tensors, entries = written(tmp_path / "expected")
    convert = ["convert", tmp_path / "c", tmp_path / "hf", "--to", "huggingface"]
    code, _, err = run(*convert)
    assert (code, "has no config.json, which" in err, err.count("\n")) == (1, True, 1)
    code, out, _ = run(*convert, "--config", config)
    assert (code, out) == (0, f"{tmp_path / 'hf'}: huggingface, 21 tensors\n")
    assert written(tmp_path / "hf") == (tensors, entries)
    one = ["convert", tmp_path / "c", tmp_path / "one", "--to", "bitsandbytes", "--config", config]
    assert run(*one)[0] == 0
    assert (tmp_path / "one").read_bytes() == tensors
    code, _, err = run(*one)
    assert (code, f"{tmp_path / 'one'} exists already" in err) == (3, True)
    assert not list(tmp_path.glob(".convert-*"))


def test_layers_that_are_quantized_differently(run, dense, tmp_path, config):
    """They have stacks of their own, as the names in a checkpoint tell."""
    save_pretrained(dense, tmp_path / "dense")
    skip = ("lm_head", "model.layers.1.mlp")
    mixed = from_pretrained(tmp_path / "dense", q4jax.QuantConfig(skip=skip))
    checkpoint.save(tmp_path / "c", mixed)
    convert = ["convert", tmp_path / "c", tmp_path / "hf", "--to", "huggingface"]
    code, _, err = run(*convert, "--config", config)
    assert code == 0, err
    save_pretrained(mixed, tmp_path / "expected")
    assert written(tmp_path / "hf") == written(tmp_path / "expected")


@pytest.mark.slow
def test_adapters_are_merged(run, adapted, tmp_path, config):
    """The scale is in no checkpoint; the rest of a training state is left out."""
    checkpoint.save(tmp_path / "c", {"model": adapted, "step": jnp.zeros(())})
    convert = ["convert", tmp_path / "c", tmp_path / "hf", "--to", "huggingface"]
    code, _, err = run(*convert, "--config", config)
    assert (code, err.count("\n")) == (2, 1)
    assert "has adapters, whose scale no checkpoint holds: pass --alpha A" in err
    code, _, err = run(*convert, "--config", config, "--alpha", 6, "--rslora")
    assert code == 0, err
    save_pretrained(q4jax.merge_lora(adapted), tmp_path / "expected")
    assert written(tmp_path / "hf") == written(tmp_path / "expected")


def test_a_config_of_another_model_is_named(run, quantized, tmp_path, config):
    checkpoint.save(tmp_path / "c", quantized)
    config.write_text(json.dumps({**CONFIG.to_hf(), "num_hidden_layers": 3}))
    convert = ["convert", tmp_path / "c", tmp_path / "hf", "--to", "huggingface"]
    code, _, err = run(*convert, "--config", config)
    assert (code, err.count("\n")) == (1, 1)
    assert "target does not match the checkpoint" in err and "[3, 64]" in err
    assert not (tmp_path / "hf").exists()


def test_without_a_config_each_layer_is_an_entry(run, quantized, tmp_path):
    """Leaves under one name with the same leading axes are numbered there."""
    checkpoint.save(tmp_path / "c", {"net": quantized, "w": quantized.layers.mlp.up_proj})
    code, out, err = run("convert", tmp_path / "c", tmp_path / "one", "--to", "bitsandbytes")
    assert code == 0, err
    found = bitsandbytes.load_file(tmp_path / "one")
    assert f"{tmp_path / 'one'}: bitsandbytes, {len(found)} tensors\n" == out
    up = quantized.layers.mlp.up_proj
    for at in range(2):
        expected = np.asarray(up.kernel.dequantize()[at])
        for name in (f"net.layers.{at}.mlp.up_proj.weight", f"w.{at}.weight"):
            np.testing.assert_array_equal(found[name].dequantize().T, expected)
        scale = found[f"net.layers.{at}.input_layernorm.scale"]
        np.testing.assert_array_equal(scale, quantized.layers.input_layernorm.scale[...][at])
    np.testing.assert_array_equal(found["net.norm.scale"], quantized.norm.scale[...])


def test_a_stack_alone_keeps_its_name(run, quantized, tmp_path):
    checkpoint.save(tmp_path / "c", {"net": {"up": quantized.layers.mlp.up_proj}})
    code, _, err = run("convert", tmp_path / "c", tmp_path / "one", "--to", "bitsandbytes")
    assert code == 0, err
    assert set(bitsandbytes.load_file(tmp_path / "one")) == {"net.0.up.weight", "net.1.up.weight"}
