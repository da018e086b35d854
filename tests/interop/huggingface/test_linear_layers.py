"""The layers that are quantized in directories of each architecture."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.interop import huggingface
from q4jax.interop.huggingface.architectures import ARCHITECTURES
from q4jax.interop.huggingface.linear_layers import choose_layers, skip_list

# Written by transformers, see tests/support/tiny_transformers.py.
EXPECTED = json.loads(Path(__file__).with_name("linear_layers.json").read_text())
# What transformers cannot write on a CPU, or has nothing to write of.
NOT_WRITTEN = {"falcon", "llama4_text"}
DEFAULT = q4jax.QuantConfig()
SIZE = (64, 64)


def tensors(case):
    matrices = [*case["linear"], *case["transposed"], *case["kept"]]
    return dict.fromkeys(matrices, SIZE) | dict.fromkeys(case["biases"], (2,))


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case["config"]["architectures"][0])
def test_as_transformers_quantizes(case):
    found = choose_layers(case["config"], tensors(case), DEFAULT)
    expected = dict.fromkeys(case["linear"], "linear")
    assert found == expected | dict.fromkeys(case["transposed"], "transposed")


def test_every_architecture_has_data():
    assert {case["config"]["model_type"] for case in EXPECTED} == ARCHITECTURES.keys() - NOT_WRITTEN


def test_the_guide_lists_the_architectures():
    guide = (Path(__file__).parents[3] / "docs/files.md").read_text()
    table = guide.split("| | architectures |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(.+?)`", table)) == ARCHITECTURES.keys()


def test_what_is_not_known_is_refused_by_name():
    shapes = {"model.layers.0.mlp.up_proj.weight": SIZE}
    with pytest.raises(NotImplementedError, match="of model_type 'own' are linear is not known"):
        choose_layers({"model_type": "own"}, shapes, DEFAULT)
    with pytest.raises(
        NotImplementedError, match="model_type None .*`select=`, or --modules REGEX"
    ):
        choose_layers({}, shapes, DEFAULT)
    shapes["model.layers.0.mlp.other.weight"] = SIZE
    with pytest.raises(NotImplementedError, match="mlp.other.weight of model_type 'llama'"):
        choose_layers({"model_type": "llama"}, shapes, DEFAULT)


def test_tensors_that_are_no_matrices_stay():
    shapes = {"model.layers.0.self_attn.q_proj.weight": SIZE, "model.norm.weight": (64,)}
    shapes |= {"model.layers.0.mlp.experts.gate_up_proj": (4, 64, 64)}
    shapes |= {"model.layers.0.block_sparse_moe.input_linear.weight": (4, 64, 64)}
    found = choose_layers({"model_type": "granitemoe"}, shapes, DEFAULT)
    assert found == {"model.layers.0.self_attn.q_proj.weight": "linear"}


@pytest.mark.parametrize(
    ("model_type", "head"), [("llama", "lm_head"), ("gpt_neox", "embed_out"), ("llama", "score")]
)
def test_the_head_is_kept_unless_skip_leaves_it_out(model_type, head):
    shapes = {f"{head}.weight": SIZE}
    assert choose_layers({"model_type": model_type}, shapes, DEFAULT) == {}
    everything = q4jax.QuantConfig(skip=())
    assert choose_layers({"model_type": model_type}, shapes, everything) == dict.fromkeys(
        shapes, "linear"
    )


def test_the_last_layer_of_a_classifier_is_kept_if_it_has_no_bias():
    shapes, name = {"score.weight": SIZE}, "score.weight"
    assert choose_layers({"model_type": "llama"}, shapes, DEFAULT) == {}
    found = choose_layers({"model_type": "llama"}, shapes | {"score.bias": (64,)}, DEFAULT)
    assert found == {name: "linear"}


def test_a_bare_model_keeps_the_layer_that_ends_it():
    names = [f"layers.{n}.mlp.down_proj.weight" for n in (2, 10, 9)]
    shapes = dict.fromkeys(names, SIZE)
    bare = {"model_type": "olmo", "architectures": ["OlmoModel"]}
    assert list(choose_layers(bare, shapes, DEFAULT)) == [names[0], names[2]]
    whole = {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}
    assert list(choose_layers(whole, shapes, DEFAULT)) == names


def test_skip_names_modules():
    shapes = dict.fromkeys(["h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"], SIZE)
    found = choose_layers({"model_type": "gpt2"}, shapes, q4jax.QuantConfig(skip=("h.0.mlp",)))
    assert found == {"h.0.attn.c_attn.weight": "transposed"}


def test_skip_is_refused_where_transformers_has_other_paths():
    shapes = {"vit.encoder.layer.0.output.dense.weight": SIZE}
    skip = q4jax.QuantConfig(skip=("lm_head", "dense"))
    with pytest.raises(NotImplementedError, match="skip 'dense' is not supported for .*'vit'"):
        choose_layers({"model_type": "vit"}, shapes, skip)
    assert choose_layers({"model_type": "vit"}, shapes, DEFAULT)


def test_select_decides_instead_of_the_table():
    shapes = dict.fromkeys(["a.b.weight", "a.c.weight", "lm_head.weight"], SIZE)
    found = choose_layers({"model_type": "own"}, shapes, DEFAULT, lambda name, _: "c" not in name)
    assert found == {"a.b.weight": "linear"}
    kernel = {"h.0.mlp.c_fc.weight": SIZE}
    found = choose_layers({"model_type": "gpt2"}, kernel, DEFAULT, lambda name, _: True)
    assert found == {"h.0.mlp.c_fc.weight": "transposed"}


def test_kernels_of_gpt2_are_turned(tmp_path):
    kernel = np.random.default_rng(0).normal(size=(64, 192)).astype("f4")
    name, config = "transformer.h.0.attn.c_attn.weight", {"model_type": "gpt2"}
    huggingface.save_directory({name: kernel}, tmp_path / "full", config)
    weights = huggingface.load_directory(tmp_path / "full", DEFAULT)
    expected = q4jax.Params4bit.quantize(jnp.asarray(kernel.T), 64, True, "nf4")
    assert weights[name].quant_state.shape == (192, 64)
    assert q4jax.fingerprint({"w": weights[name]}) == q4jax.fingerprint({"w": expected})


def test_a_directory_is_refused_before_it_is_read(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    huggingface.save_directory(
        {name: np.full((8, 64), np.nan, "f4")}, tmp_path, {"model_type": "x"}
    )
    with pytest.raises(NotImplementedError, match="model_type 'x'"):
        huggingface.load_directory(tmp_path, DEFAULT)


QUANTIZED = q4jax.Params4bit.quantize(jnp.ones((8, 64)))
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
T5 = "encoder.block.0.layer.1.DenseReluDense"


@pytest.mark.parametrize(
    ("model_type", "weights", "expected"),
    [
        # Tied: transformers makes a linear layer of the head, which the file does not have.
        ("llama", {UP: QUANTIZED, "model.embed_tokens": np.ones((8, 64))}, ["lm_head"]),
        ("llama", {UP: QUANTIZED, "lm_head": np.ones((8, 64))}, ["lm_head"]),
        ("llama", {UP: QUANTIZED, "lm_head": QUANTIZED}, []),
        ("llama", {UP: QUANTIZED, DOWN: np.ones((8, 64))}, ["lm_head", DOWN]),
        ("gpt_neox", {UP: QUANTIZED, "embed_out": np.ones((8, 64))}, ["lm_head", "embed_out"]),
        ("t5", {f"{T5}.wi": QUANTIZED, f"{T5}.wo": np.ones((8, 64))}, ["lm_head"]),
        # A type that is not known: matrices but for those of embeddings, by name.
        (
            "own",
            {
                UP: QUANTIZED,
                DOWN: np.ones((8, 64)),
                "embed": np.ones((8, 64)),
                "norm": np.ones(8),
            },
            [DOWN],
        ),
    ],
)
def test_the_skip_list_names_all_dense_linear_layers(tmp_path, model_type, weights, expected):
    weights = {f"{path}.weight": weight for path, weight in weights.items()}
    config = {"model_type": model_type}
    assert skip_list(config, weights) == expected
    entry = huggingface.bnb_config(weights, "uint8", None, config)
    assert entry["llm_int8_skip_modules"] == expected
    huggingface.save_directory(weights, tmp_path, config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"] == entry
