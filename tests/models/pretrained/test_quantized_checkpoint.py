"""Directories that bitsandbytes quantized: logits and gradients of transformers, to rounding."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import q4jax
from q4jax.interop import bitsandbytes, huggingface
from q4jax.models import Llama, LlamaConfig, from_pretrained, save_pretrained
from q4jax.nnx.variables import from_variables
from tests.support.random_weights import write_directory
from tests.support.vectors import GOLDEN

LLAMA = GOLDEN / "llama_tiny_bnb4"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def expected():
    return load_file(LLAMA / "expected.safetensors")


@pytest.fixture(scope="module")
def golden():
    return from_pretrained(LLAMA)


class Given(nnx.Module):
    """An embedding that returns given hidden states."""

    def __init__(self, hidden):
        self.hidden = nnx.Param(hidden)

    def __call__(self, _):
        return self.hidden[...]


def test_golden_logits_loss_and_gradient(golden, expected, relative):
    ids = jnp.asarray(expected["input_ids"], jnp.int32)
    model = nnx.clone(golden)
    model.embed_tokens = Given(golden.embed_tokens(ids))

    @nnx.jit
    def run(model):
        def loss(model):
            logits = model(ids)
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logp, ids[:, 1:, None], -1).mean(), logits

        hidden = nnx.DiffState(0, nnx.PathContains("hidden"))
        return nnx.value_and_grad(loss, argnums=hidden, has_aux=True)(model)

    (loss, logits), grads = run(model)
    assert relative(logits, expected["logits"]) < 1e-5
    np.testing.assert_allclose(loss, expected["loss"].squeeze(), rtol=1e-5)
    (gradient,) = jax.tree.leaves(grads)
    assert relative(gradient, expected["d_inputs_embeds"]) < 1e-5


def test_every_projection_is_what_the_file_holds(golden):
    tree = bitsandbytes.load_file(LLAMA / "model.safetensors")
    weight = golden.layers.mlp.up_proj.weight
    layer = jax.tree.map(lambda a: a[1], from_variables(weight))
    assert q4jax.fingerprint({"w": layer}) == q4jax.fingerprint({"w": tree[UP]})
    assert type(golden.lm_head) is nnx.Linear
    assert golden.layers.self_attn.k_proj.quant_type == "nf4"


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_compute_dtype_of_the_config_or_the_caller(tmp_path, golden, expected, forward, compute):
    copy(
        tmp_path,
        lambda config: config["quantization_config"].update(bnb_4bit_compute_dtype=compute),
    )
    ids = jnp.asarray(expected["input_ids"], jnp.int32)
    logits = forward(from_pretrained(tmp_path), ids)
    assert logits.dtype == compute
    largest = np.abs(expected["logits"]).max()
    assert np.abs(logits.astype(jnp.float32) - expected["logits"]).max() < 2.5e-2 * largest
    same = logits.argmax(-1) == expected["logits"].argmax(-1)
    assert same.mean() >= 0.95
    exact = forward(from_pretrained(tmp_path, dtype="float32"), ids)
    np.testing.assert_array_equal(exact, forward(golden, ids))


def copy(folder, change=lambda config: None, tensors=lambda tensors: None):
    """Copy the golden directory with changes."""
    config = json.loads((LLAMA / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        found = load_file(LLAMA / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_written_directory_is_the_one_read(golden, tmp_path, shard_bytes, storage):
    save_pretrained(golden, tmp_path, shard_bytes, quant_storage=storage)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**9)
    again = from_pretrained(tmp_path)
    assert again.config == golden.config
    assert q4jax.fingerprint(again) == q4jax.fingerprint(golden)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(golden))
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    theirs = json.loads((LLAMA / "config.json").read_text())["quantization_config"]
    same = theirs | {"bnb_4bit_quant_storage": storage, "llm_int8_skip_modules": ["lm_head"]}
    assert written == same
    if (shard_bytes, storage) == (10**9, "uint8"):
        ours, golden_tensors = (
            load_file(folder / "model.safetensors") for folder in (tmp_path, LLAMA)
        )
        assert ours.keys() == golden_tensors.keys()
        for name, array in golden_tensors.items():
            assert (array.dtype, array.tobytes()) == (ours[name].dtype, ours[name].tobytes()), name
    with pytest.raises(FileExistsError, match="config.json exists already"):
        save_pretrained(golden, tmp_path)


def test_a_tied_head(golden, tmp_path, expected, forward, relative):
    def tie(tensors):
        del tensors["lm_head.weight"]

    copy(tmp_path, lambda config: config.update(tie_word_embeddings=True), tie)
    model = from_pretrained(tmp_path)
    assert not hasattr(model, "lm_head")
    ids = jnp.asarray(expected["input_ids"], jnp.int32)
    untied = nnx.clone(golden)
    untied.lm_head.kernel[...] = golden.embed_tokens.embedding[...].T
    assert relative(forward(model, ids), forward(untied, ids)) < 1e-6


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def quantize(name, **settings):
    def apply(tensors):
        w = jnp.ones((320, 128)) if "embed" in name or "head" in name else jnp.ones((256, 128))
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]
        tensors.update(q4jax.Params4bit.quantize(w, **settings).state_dict(name))

    return apply


def dense(name, shape):
    def apply(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]
        tensors[name] = np.ones(shape, np.float32)

    return apply


NESTED = {"quant_type": "nf4", "compress_statistics": True}
STATE = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (drop(UP), f"{UP} has statistics but no codes"),
        (drop(f"{UP}.absmax"), f"{UP}: missing keys .*absmax"),
        (drop(f"{UP}.{STATE}"), f"{UP}.* has no quant_state"),
        (quantize(UP, quant_type="fp4"), f"says nf4, .*=True, but {UP} is fp4_b64_n0_"),
        (quantize(UP, quant_type="nf4"), f"says nf4, .*=True, but {UP} is nf4_b64_n0_"),
        (quantize("model.embed_tokens.weight", **NESTED), "embed_tokens.weight is 4-bit, but not"),
        (lambda t: t.update(extra=np.ones(1)), r"unexpected: \['extra'\]"),
    ],
)
def test_defects_are_named(tmp_path, tensors, message):
    copy(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [dense(UP, (256, 128)), quantize(UP, **NESTED, blocksize=32)])
def test_a_layer_that_differs_has_a_stack_of_its_own(tmp_path, change):
    model = from_pretrained(copy(tmp_path, tensors=change))
    first, second = (model.stack(stack.name).mlp.up_proj for stack in model.stacks[:2])
    assert [stack.numbers for stack in model.stacks][:2] == [(0,), (1,)]
    assert first.weight.quant_state.spec.blocksize == 64
    if isinstance(second, nnx.Linear):
        np.testing.assert_array_equal(second.kernel[...], np.ones((1, 128, 256)))
    else:
        assert second.weight.quant_state.spec.blocksize == 32


def test_a_quantized_head_is_a_linear_layer(tmp_path):
    model = from_pretrained(copy(tmp_path, tensors=quantize("lm_head.weight", **NESTED)))
    assert model.lm_head.weight.quant_state.spec.shape == (320, 128)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quant_method": "gptq"}, NotImplementedError, "quant_method='gptq'"),
        ({"quant_method": "awq"}, NotImplementedError, "quant_method='awq'"),
        ({"load_in_8bit": True, "load_in_4bit": False}, NotImplementedError, "LLM.int8"),
        ({"bnb_4bit_quant_type": "fp4"}, ValueError, "says fp4, .* is nf4_"),
        ({"bnb_4bit_quant_type": "int4"}, ValueError, "config.json: quant_type must be"),
        ({"llm_int8_skip_modules": 3}, ValueError, "skip_modules must be a list of names, got 3"),
        ({"unheard_of": 1}, ValueError, r"unknown keys .*\['unheard_of'\]"),
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path, change, error, message):
    copy(tmp_path, lambda config: config["quantization_config"].update(change))
    with pytest.raises(error, match=message):
        from_pretrained(tmp_path)


def test_a_config_without_quantization(tmp_path):
    copy(tmp_path, lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"has no quantization_config, but model.layers.0"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized already; quantization must be None"):
        from_pretrained(LLAMA, quantization=q4jax.QuantConfig())


def test_trees_of_weights_go_out_and_in(tmp_path):
    tree = huggingface.load_directory(LLAMA)
    assert sum(isinstance(w, q4jax.Params4bit) for w in tree.values()) == 14
    config = json.loads((LLAMA / "config.json").read_text())
    huggingface.save_directory(tree, tmp_path / "a", config)
    ours = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert ours == (LLAMA / "model.safetensors").read_bytes()
    again = huggingface.load_directory(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    mixed = tree | {"x.weight": q4jax.Params4bit.quantize(jnp.ones((2, 64)))}
    with pytest.raises(ValueError, match="one quantization_config cannot describe all of"):
        huggingface.save_directory(mixed, tmp_path / "b", config)
    assert not (tmp_path / "b").exists()


def test_quantized_while_loading_is_quantized_after(tmp_path):
    config = LlamaConfig.from_hf(json.loads((LLAMA / "config.json").read_text()))
    model = Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    save_pretrained(model, tmp_path)
    settings = q4jax.QuantConfig(quant_type="fp4")
    loaded = from_pretrained(tmp_path, quantization=settings)
    expected = q4jax.fingerprint(q4jax.quantize_model(model, settings))
    assert q4jax.fingerprint(loaded) == expected
    tree = huggingface.load_directory(tmp_path, settings)
    kept = {name for name, w in tree.items() if not isinstance(w, q4jax.Params4bit)}
    assert {n for n in kept if "norm" not in n} == {"lm_head.weight", "model.embed_tokens.weight"}
    layer = jax.tree.map(lambda a: a[1], from_variables(loaded.layers.mlp.up_proj.weight))
    assert q4jax.fingerprint({"w": layer}) == q4jax.fingerprint({"w": tree[UP]})


def test_progress_is_drawn(tmp_path, capsys):
    shutil.copytree(LLAMA, tmp_path / "c")
    from_pretrained(tmp_path / "c", progress=True)
    assert capsys.readouterr().err == "load [" + "#" * 30 + "] 100% of 500.0 kB\n"
    from_pretrained(tmp_path / "c")
    assert capsys.readouterr().err == ""


MIXTURES = ("gpt_oss", "llama4_text", "granitemoe", "mixtral", "qwen2_moe")


@pytest.mark.parametrize("case", MIXTURES)
def test_dense_experts(case, tmp_path):
    """4-bit experts are written in full, with the weights that the model computes with."""
    vectors = write_directory(case, tmp_path / "full")
    model = from_pretrained(tmp_path / "full", quantization=q4jax.QuantConfig(blocksize=32))
    save_pretrained(model, tmp_path / "dense", dense_experts=True)
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    quantized = [name for name in tensors if name.endswith("absmax")]
    assert quantized
    assert not any(".experts" in name or "_linear." in name for name in quantized)
    ids, mask = (jnp.asarray(vectors[name]) for name in ("input_ids", "attention_mask"))
    run = nnx.jit(lambda m: m(ids, attention_mask=mask))
    found, expected = run(from_pretrained(tmp_path / "dense")), run(model)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["gpt_oss", "llama4_text", "granitemoe"])
def test_experts_of_one_tensor_are_written_dense_only(case, tmp_path):
    write_directory(case, tmp_path / "full")
    model = from_pretrained(tmp_path / "full", quantization=q4jax.QuantConfig(blocksize=32))
    with pytest.raises(ValueError, match="one tensor of all experts.*dense_experts=True"):
        save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
