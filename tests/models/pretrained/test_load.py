"""Directories round-trip, load lazily, and defects are named errors."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import q4jax
from q4jax.models import Llama, LlamaConfig, from_pretrained, from_state_dict, save_pretrained
from tests.support.random_weights import write_directory

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(model, tmp_path):
    save_pretrained(model, tmp_path)
    return tmp_path


def edit(folder, change):
    """Rewrite the tensors of a directory after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
@pytest.mark.parametrize("biases", [False, True])
def test_round_trip(config, tmp_path, input_ids, shard_bytes, biases, forward):
    config = dataclasses.replace(config, attention_bias=biases, mlp_bias=biases)
    model = Llama(config, rngs=nnx.Rngs(4))
    save_pretrained(model, tmp_path, max_shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    np.testing.assert_array_equal(forward(loaded, input_ids), forward(model, input_ids))


def test_names_and_orientation_are_hugging_face_s(folder, model):
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.2.self_attn.k_proj.weight"].shape == (16, 32)
    np.testing.assert_array_equal(tensors[UP], model.layers.mlp.up_proj.kernel[1].T)
    others = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert others == {name for name in tensors if "layers" not in name}


@pytest.mark.parametrize("stored", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_weights_keep_their_dtype_and_compute_in_it(config, tmp_path, input_ids, stored, forward):
    save_pretrained(Llama(config, param_dtype=stored, rngs=nnx.Rngs(1)), tmp_path)
    model = from_pretrained(tmp_path)
    assert model.layers.mlp.up_proj.kernel.dtype == stored
    assert model.layers.input_layernorm.scale.dtype == jnp.float32
    assert forward(model, input_ids).dtype == stored
    assert forward(from_pretrained(tmp_path, dtype="float32"), input_ids).dtype == jnp.float32
    scales = ("model.norm.weight", "model.layers.1.input_layernorm.weight")
    written = load_file(tmp_path / "model.safetensors")
    assert {written[name].dtype for name in scales} == {np.dtype(stored)}
    model.norm.scale[...] += 1e-4  # what a scale of 16 bits does not hold
    save_pretrained(model, tmp_path / "trained")
    written = load_file(tmp_path / "trained" / "model.safetensors")
    assert written["model.norm.weight"].dtype == np.float32
    assert written[scales[1]].dtype == stored


def test_dtype_of_transformers_4(folder, input_ids, forward):
    edit_config(folder, dtype=None, torch_dtype="bfloat16")
    assert forward(from_pretrained(folder), input_ids).dtype == jnp.bfloat16


def test_tied_head_is_not_stored_or_equals_the_embedding(config, tmp_path, input_ids, forward):
    config = dataclasses.replace(config, tie_word_embeddings=True)
    model = Llama(config, rngs=nnx.Rngs(4))
    save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        forward(from_pretrained(tmp_path), input_ids), forward(model, input_ids)
    )

    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    from_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"unexpected: .'lm_head.weight'."):
        from_pretrained(tmp_path)


def test_derived_buffers_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda t: t.update({name: np.ones(4, np.float32)}))
    from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"missing: .'{UP}'."),
        (lambda t: t.update(extra=np.ones(1)), "unexpected: .'extra'."),
        (lambda t: t.update({UP: t[UP].T.copy()}), f"{UP} is .32, 48.; .* .48, 32."),
        (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"{UP} is int8"),
        (lambda t: t.update({UP: t[UP].astype(np.float16)}), f"{UP} is float16, .* float32"),
    ],
)
def test_defects_of_tensors_are_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


def test_missing_files(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        from_pretrained(folder)


def test_defects_of_the_index_are_named(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    where = index["weight_map"]

    file.write_text(json.dumps({"weight_map": where | {"ghost": where[UP]}}))
    with pytest.raises(ValueError, match=r"no shard holds: .'ghost'."):
        from_pretrained(tmp_path)
    other = next(shard for shard in where.values() if shard != where[UP])
    file.write_text(json.dumps({"weight_map": where | {UP: other}}))
    # transformers reads every shard, wherever the index places a tensor.
    loaded = from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.layers.mlp.up_proj.kernel, model.layers.mlp.up_proj.kernel)
    file.write_text(json.dumps(index))
    (tmp_path / where[UP]).unlink()
    with pytest.raises(FileNotFoundError, match=where[UP]):
        from_pretrained(tmp_path)


def test_what_is_not_implemented_is_said(folder, config):
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(NotImplementedError, match=r"quantized already .*'gptq'"):
        from_pretrained(folder)
    edit_config(folder, quantization_config=None, model_type="mamba")
    with pytest.raises(NotImplementedError, match=r"model_type 'mamba'"):
        from_pretrained(folder)


def test_save_refuses_what_is_not_dense(config, tmp_path):
    model = Llama(config, rngs=nnx.Rngs(0))
    model.layers.mlp.up_proj.lora_a = nnx.LoRAParam(jnp.zeros((3, 32, 4)))
    with pytest.raises(TypeError, match=r"layers.mlp.up_proj.lora_a is a LoRAParam"):
        save_pretrained(model, tmp_path)


def test_one_tensor_at_a_time(model, tmp_path, config):
    """Loading looks up each projection once and releases it after stacking."""
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lookups = []

    class Watched(dict):
        def __getitem__(self, name):
            lookups.append(name)
            return super().__getitem__(name)

    from_state_dict(config, Watched(stored))
    assert all(lookups.count(name) == 1 for name in stored if "layers" in name)


def test_quantization_while_loading(config, tmp_path, input_ids, forward, relative):
    config = dataclasses.replace(config, hidden_size=64, intermediate_size=128, head_dim=16)
    save_pretrained(Llama(config, rngs=nnx.Rngs(4)), tmp_path)
    model = from_pretrained(tmp_path, quantization=q4jax.QuantConfig(quant_type="fp4"))
    assert isinstance(model.layers.mlp.up_proj, q4jax.Linear4bit)
    assert model.layers.mlp.up_proj.weight.packed.shape == (3, 128, 32)
    assert type(model.lm_head) is nnx.Linear
    dense = q4jax.dequantize_model(model)
    assert relative(forward(model, input_ids), forward(dense, input_ids)) < 1e-5

    edit(tmp_path, lambda t: t[UP].__setitem__((3, 5), np.nan))
    from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{UP}: w holds NaN"):
        from_pretrained(tmp_path, quantization=q4jax.QuantConfig())


def test_rules_for_each_layer(tmp_path):
    """Each layer gets the settings of its rule, as with `quantize_model`."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    save_pretrained(model, tmp_path)
    rules = [
        q4jax.QuantRule(r".*_proj", blocksize=32, quant_type="fp4", compress_statistics=False),
        q4jax.QuantRule("lm_head", skip=True),
    ]
    loaded = from_pretrained(tmp_path, rules)
    assert loaded.layers.mlp.up_proj.weight.quant_state.spec.tag().startswith("fp4_b32_n0_")
    expected = q4jax.quantize_model(model, rules)
    assert q4jax.fingerprint(loaded) == q4jax.fingerprint(expected)
    with pytest.raises(ValueError, match="embed_tokens: only linear layers are quantized while"):
        from_pretrained(tmp_path, [q4jax.QuantRule("embed_tokens", embeddings=True)])
    with pytest.raises(TypeError, match="a QuantConfig or a list of QuantRules, got 'nf4'"):
        from_pretrained(tmp_path, "nf4")


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "llama",
            {"model_type": "mistral"},
            "of a mistral .* unexpected: .*down_proj.bias.* and 18 more",
        ),
        ("llama", {"attention_bias": False}, "of a llama .* unexpected: .*o_proj.bias"),
        ("llama", {"model_type": "qwen3"}, "of a qwen3 .* missing: .*k_norm.weight"),
        ("mixtral", {"num_local_experts": 6}, r"missing: .*experts.5.w1.weight"),
        ("mixtral", {"num_local_experts": 10**6}, "num_experts=1000000, but there are 91 tensors"),
        ("qwen3_moe", {"moe_intermediate_size": 25}, r"is \(32, 24\); .* \(32, 25\)"),
        ("mistral", {"num_key_value_heads": 4}, r"k_proj.weight is \(32, 32\); .* \(64, 32\)"),
    ],
)
def test_configs_that_contradict_the_weights_are_named(case, change, message, tmp_path):
    write_directory(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.compile(message)):
        from_pretrained(tmp_path)


def test_the_tokenizer_is_written_beside_the_model(model, tmp_path):
    class Transformers:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")
            (Path(folder) / "tokenizer_config.json").write_text("{}")

    class Tokenizers:
        def save(self, file):
            Path(file).write_text("{}")

    save_pretrained(model, tmp_path / "one", tokenizer=Transformers())
    (tmp_path / "one" / "notes.txt").write_text("not of the tokenizer")
    save_pretrained(model, tmp_path / "two", tokenizer=tmp_path / "one")
    save_pretrained(model, tmp_path / "three", tokenizer=Tokenizers())
    files = {"config.json", "model.safetensors", "tokenizer.json"}
    for name, more in (("one", {"notes.txt"}), ("two", set()), ("three", None)):
        found = {file.name for file in (tmp_path / name).iterdir()}
        assert found == files | ({"tokenizer_config.json"} | more if more is not None else set())


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        (3, TypeError, "tokenizer must be a directory, .* got int"),
        ("nowhere", FileNotFoundError, "tokenizer: nowhere has none of .*tokenizer.json"),
    ],
)
def test_a_wrong_tokenizer_is_named_before_anything_is_written(
    model, tmp_path, tokenizer, error, message
):
    with pytest.raises(error, match=message):
        save_pretrained(model, tmp_path / "new", tokenizer=tokenizer)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (("lm_head", "layers.mlp"), "mlp"),
        (("lm_head", *(f"model.layers.{i}.mlp" for i in range(3))), "mlp"),
        ((r"model\.layers\.\d+\.self_attn",), "self_attn"),
    ],
)
def test_a_skip_list_names_modules_of_either_model(tmp_path, model, skip, dense):
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, q4jax.QuantConfig(skip=skip))
    found = {"mlp": loaded.layers.mlp.up_proj, "self_attn": loaded.layers.self_attn.q_proj}
    assert {n: isinstance(m, nnx.Linear) for n, m in found.items()} == {
        n: n == dense for n in found
    }


def test_a_skip_list_of_some_layers_makes_stacks(tmp_path, model, input_ids, forward, relative):
    save_pretrained(model, tmp_path / "full")
    skip = ("lm_head", "model.layers.0.mlp")
    mixed = from_pretrained(tmp_path / "full", q4jax.QuantConfig(skip=skip, blocksize=32))
    assert [stack.numbers for stack in mixed.stacks] == [(0,), (1, 2)]
    first, rest = (mixed.stack(stack.name).mlp.up_proj for stack in mixed.stacks)
    assert type(first) is nnx.Linear
    assert isinstance(rest, q4jax.Linear4bit)
    rule = [q4jax.QuantRule(r"layers\.[12]\.mlp\.up_proj", blocksize=32)]
    by_rule = from_pretrained(tmp_path / "full", rule)
    second = by_rule.stack("layers.from_1").mlp
    assert isinstance(second.up_proj, q4jax.Linear4bit)
    assert type(second.down_proj) is type(by_rule.stack("layers.from_0").mlp.up_proj) is nnx.Linear
    expected = forward(q4jax.dequantize_model(mixed), input_ids)
    assert relative(forward(mixed, input_ids), expected) < 1e-5
    save_pretrained(mixed, tmp_path / "mixed")
    again = from_pretrained(tmp_path / "mixed")
    assert q4jax.fingerprint(again) == q4jax.fingerprint(mixed)
    assert relative(forward(again, input_ids), expected) < 1e-5


def test_a_skip_list_of_no_layer_is_refused(tmp_path, model):
    save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="skip has 'model.layers.7', which no module matches"):
        from_pretrained(tmp_path, q4jax.QuantConfig(skip=("model.layers.7",)))
