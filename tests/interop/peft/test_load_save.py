"""PEFT's adapters: PEFT's own results with them, and its files read and written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import q4jax
from q4jax.interop import peft
from q4jax.models import Llama, LlamaConfig
from q4jax.nnx.variables import from_variables
from tests.support.vectors import MANIFEST, tensors

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["proj"]}
A, B = (f"base_model.model.proj.lora_{side}.weight" for side in "AB")


def write(folder, pairs, **changes):
    """Write a directory as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    pairs = {name: np.ascontiguousarray(array) for name, array in pairs.items()}
    save_file(pairs, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def close(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_golden_forward_gradients_and_merge(quant_type, tmp_path):
    t, info = tensors(f"lora_{quant_type}"), MANIFEST["lora"][quant_type]
    linear = q4jax.Linear4bit(
        128,
        96,
        use_bias=False,
        quant_type=quant_type,
        compress_statistics=info["nested"],
        kernel_init=lambda *_: jnp.asarray(t["w_orig"].T),
        rngs=nnx.Rngs(0),
    )
    write(tmp_path, {A: t["lora_A"], B: t["lora_B"]})
    model = peft.load_adapters(nnx.Dict(proj=linear), tmp_path)
    assert model.proj.scale == info["scaling"]

    @nnx.jit
    def run(model, x, g):
        def loss(x, model):
            y = model.proj(x)
            return (y * g).sum(), y

        argnums = (0, nnx.DiffState(1, nnx.LoRAParam))
        (_, y), (dx, grads) = nnx.value_and_grad(loss, argnums=argnums, has_aux=True)(x, model)
        return y, dx, grads

    y, dx, grads = run(model, jnp.asarray(t["x"]), jnp.asarray(t["g"]))
    # Nested: the codes of scales near their mean may be one off in what the CPU wrote.
    tolerance = 1e-5 if info["nested"] else 2e-6
    for found, name in zip((y, dx), ("y", "dx"), strict=True):
        close(found, t[name], tolerance)
    close(grads["proj"]["lora_a"][...].T, t["dA"], tolerance)
    close(grads["proj"]["lora_b"][...].T, t["dB"], tolerance)

    merged, _ = q4jax.merge_lora(model, requantize=True)
    state = from_variables(merged.proj.weight)
    np.testing.assert_array_equal(np.ravel(state.packed), t["merged_packed"].ravel())
    close(merged.proj(jnp.asarray(t["x"])), t["y_merged"], 2e-6)


LLAMA = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture(scope="module")
def base():
    return q4jax.quantize_model(Llama(LLAMA, rngs=nnx.Rngs(0)))


def fill(model):
    for path, module in nnx.iter_modules(model):
        if isinstance(module, q4jax.lora.LoRALinear4bit):
            key = jax.random.key(len(str(path)))
            module.lora_b[...] = jax.random.normal(key, module.lora_b.shape, module.lora_b.dtype)
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_of_stacked_layers_round_trip(base, tmp_path, rslora, dtype):
    settings = {"targets": ("q_proj", "down_proj"), "rslora": rslora, "dropout": 0.25}
    model = fill(q4jax.add_lora(base, 4, 8.0, **settings, param_dtype=dtype))
    peft.save_adapters(model, tmp_path, base_model="some/base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    assert len(stored) == 8
    assert stored[name.format(1, "A")].shape == (4, 64)
    np.testing.assert_array_equal(
        stored[name.format(1, "B")], model.layers.self_attn.q_proj.lora_b[1].T
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8.0, rslora)
    assert (config["lora_dropout"], config["base_model_name_or_path"]) == (0.25, "some/base")

    found = peft.load_adapters(base, tmp_path)
    adapters = nnx.state(model, nnx.LoRAParam)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found, nnx.LoRAParam), adapters)
    layer = found.layers.mlp.down_proj
    assert layer.scale == (4.0 if rslora else 2.0)
    assert (layer.dropout.rate, layer.dropout.deterministic) == (0.25, True)
    assert not peft.load_adapters(
        base, tmp_path, train=True
    ).layers.mlp.down_proj.dropout.deterministic
    with pytest.raises(FileExistsError, match="adapter_config.json exists already"):
        peft.save_adapters(model, tmp_path)


def pairs(rank=4, layers=(0, 1), module="self_attn.q_proj", dtype=np.float32):
    names = [f"base_model.model.model.layers.{i}.{module}.lora_" for i in layers]
    a, b = np.ones((rank, 64), dtype), np.ones((64, rank), dtype)
    return {f"{n}A.weight": a for n in names} | {f"{n}B.weight": b for n in names}


def test_patterns_of_rank_and_alpha(base, tmp_path):
    both = pairs() | pairs(rank=2, module="mlp.up_proj")
    write(tmp_path, both, rank_pattern={"up_proj": 2}, alpha_pattern={"mlp.up_proj": 1})
    model = peft.load_adapters(base, tmp_path)
    assert (model.layers.self_attn.q_proj.scale, model.layers.mlp.up_proj.scale) == (3.0, 0.5)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no adapter"),
        (pairs(layers=[0, 1, 2]), "has the leading axes"),
        (pairs(layers=[0, 0, 7]), "has the leading axes"),
        (pairs(rank=8), r"lora_A \[8, 64\], lora_B \[64, 8\] are not of rank 4"),
        (pairs(module="mlp.other"), "no layer that can have the adapter of .*mlp.other"),
        ({k: v for k, v in pairs().items() if k != FIRST}, "q_proj has lora_B only"),
        (pairs() | {FIRST: np.ones((4, 32), np.float32)}, r"do not fit a layer of 64 in"),
        (pairs() | {FIRST: np.ones((4, 64), np.float16)}, "lora_A is float16, lora_B is float32"),
        (pairs(dtype=np.int8), "lora_A is int8"),
    ],
)
def test_adapters_that_do_not_fit(base, tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        peft.load_adapters(base, write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_type": "IA3"}, NotImplementedError, "peft_type 'IA3'"),
        ({"use_dora": True}, ValueError, "q_proj has no magnitude, but use_dora=True"),
        ({"lora_bias": True}, NotImplementedError, "lora_bias=True"),
        ({"trainable_token_indices": [1]}, NotImplementedError, r"trainable_token_indices=\[1\]"),
        ({"bias": "all"}, NotImplementedError, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "modules_to_save='lm_head': the files have"),
        ({"modules_to_save": "lm_head"}, ValueError, "modules_to_save must be a list"),
        ({"init_lora_weights": "pissa"}, NotImplementedError, "'pissa' changes the base weights"),
        ({"rank_pattern": {"(a": 2}}, ValueError, r"rank_pattern: '\(a' is not a regular expr"),
        ({"rank_pattern": {"(a+)+b": 2}}, NotImplementedError, r"'\(a\+\)\+b' may take very long"),
        (
            {"alpha_pattern": {".*" * 9: 2}},
            NotImplementedError,
            "alpha_pattern.*may take very long",
        ),
        ({"r": 0}, ValueError, "r must be a positive integer, got 0"),
        ({"r": True}, ValueError, "r must be a positive integer, got True"),
        ({"lora_alpha": "8"}, ValueError, "lora_alpha must be a finite number, got '8'"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout must be at least 0 and below 1"),
        ({"use_rslora": 1}, ValueError, "use_rslora must be true or false, got 1"),
        ({"rank_pattern": [1]}, ValueError, r"rank_pattern must be an object, got \[1\]"),
        ({"unheard_of": 3}, ValueError, r"unknown entries .*\['unheard_of'\]"),
    ],
)
def test_configs_that_are_refused(base, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        peft.load_adapters(base, write(tmp_path, pairs(), **changes))


def test_other_tensors_are_refused_by_name(base, tmp_path):
    extra = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": np.ones(2)}
    with pytest.raises(NotImplementedError, match="tokens_delta is not a LoRA matrix"):
        peft.load_adapters(base, write(tmp_path / "a", pairs() | extra))
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        peft.load_adapters(base, tmp_path / "b")
    with pytest.raises(ValueError, match="no adapter to save"):
        peft.save_adapters(base, tmp_path / "c")
    with pytest.raises(ValueError, match="has adapters already"):
        peft.load_adapters(q4jax.add_lora(base, 4, 8.0), write(tmp_path / "d", pairs()))


def test_dropout_and_scale_of_dense_layers_are_kept(tmp_path):
    dense = nnx.Dict(proj=nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    model = fill(q4jax.add_lora(dense, 4, 8.0, targets="proj", dropout=0.125, rslora=True))
    peft.save_adapters(model, tmp_path, prefix="")
    for base in (q4jax.quantize_model(dense), dense):
        found = peft.load_adapters(base, tmp_path, prefix="")
        np.testing.assert_array_equal(found.proj.lora_b[...], model.proj.lora_b[...])
        assert (found.proj.scale, found.proj.dropout.rate) == (4.0, 0.125)
