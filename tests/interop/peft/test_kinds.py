"""Adapters of every kind of layer in PEFT's files, and what its files hold beside them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import q4jax
from q4jax.interop import peft
from q4jax.lora import Adapter, LoRALinear4bit
from q4jax.models import Llama, LlamaConfig
from q4jax.models.decoder.config import ExpertsConfig

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
IDS = jnp.arange(10).reshape(2, 5)
ROOT = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama():
    return Llama(LlamaConfig(**SIZES), rngs=nnx.Rngs(0))


def fill(model):
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, Adapter):
            for variable, key in zip(
                (module.lora_a, module.lora_b), (2 * i, 2 * i + 1), strict=True
            ):
                variable[...] = 0.1 * jax.random.normal(jax.random.key(key), variable.shape)
    return model


def read(folder):
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def rewrite(folder, changes, tensors):
    """Change the config and the tensors of a directory."""
    config, found = read(folder)
    (folder / CONFIG).write_text(json.dumps(config | changes))
    found = {k: np.ascontiguousarray(v) for k, v in (found | tensors).items() if v is not None}
    save_file(found, folder / TENSORS)


def same(one, other, tolerance=0.0):
    one, other = np.asarray(one), np.asarray(other)
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("name", ["lm_head", "score"])
def test_heads_are_outside_the_prefix(name, tmp_path):
    model = nnx.Dict({name: nnx.Linear(64, 32, rngs=nnx.Rngs(0))})
    adapted = fill(q4jax.add_lora(model, 4, 8, targets=(name,)))
    peft.save_adapters(adapted, tmp_path)
    config, tensors = read(tmp_path)
    assert sorted(tensors) == [f"{ROOT}{name}.lora_{side}.weight" for side in "AB"]
    assert config["target_modules"] == [name]
    x = jnp.ones((1, 64))
    same(peft.load_adapters(model, tmp_path)[name](x), adapted[name](x))


def without(folder, *parts):
    """Remove the tensors whose names hold one of the parts."""
    _, tensors = read(folder)
    rewrite(folder, {}, {k: None for k in tensors if any(part in k for part in parts)})


@pytest.mark.slow
def test_adapters_on_some_layers_are_zero_on_the_others(llama, tmp_path):
    adapted = fill(q4jax.add_lora(llama, 4, 8, targets=("q_proj",)))
    layer = adapted.layers.self_attn.q_proj
    peft.save_adapters(adapted, tmp_path / "a")
    without(tmp_path / "a", "layers.1.")
    found = peft.load_adapters(llama, tmp_path / "a")
    layer.lora_b[...] = layer.lora_b[...].at[1].set(0)
    same(found(IDS), adapted(IDS), 1e-6)
    part = found.layers.self_attn.q_proj
    assert part.parts == ((4, 8.0), (0, 0.0), (4, 8.0))
    same(q4jax.merge_lora(found)(IDS), adapted(IDS), 1e-6)

    # The missing layer gets no gradient, so that training does not make an adapter of it.
    argnums = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: (m(IDS) ** 2).sum(), argnums=argnums)(found)
    assert all(not g[1].any() and g[0].any() for g in jax.tree.leaves(grads))

    peft.save_adapters(found, tmp_path / "b")
    config, tensors = read(tmp_path / "b")
    assert not any("layers.1." in name for name in tensors)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    assert config["target_modules"] == names
    same(peft.load_adapters(llama, tmp_path / "b")(IDS), found(IDS))


def test_ranks_and_alphas_of_layers_are_kept(llama, tmp_path):
    adapted = fill(q4jax.add_lora(llama, 4, 8, targets=("q_proj", "up_proj")))
    peft.save_adapters(adapted, tmp_path / "a")
    _, tensors = read(tmp_path / "a")
    name = f"{ROOT}model.layers.1.self_attn.q_proj.lora_"
    cut = {f"{name}A.weight": tensors[f"{name}A.weight"][:2]}
    cut |= {f"{name}B.weight": tensors[f"{name}B.weight"][:, :2]}
    patterns = {"rank_pattern": {r".*\.1\..*q_proj": 2}, "alpha_pattern": {"2.*(q|up)_proj": 3}}
    rewrite(tmp_path / "a", patterns, cut)
    found = peft.load_adapters(llama, tmp_path / "a")
    q, up = found.layers.self_attn.q_proj, found.layers.mlp.up_proj
    np.testing.assert_allclose(q.scale, [2.0, 4.0, 0.75])
    np.testing.assert_allclose(up.scale, [2.0, 2.0, 0.75])
    assert not q.lora_a[1][:, 2:].any()

    peft.save_adapters(found, tmp_path / "b")
    config, again = read(tmp_path / "b")
    assert config["rank_pattern"] == {
        rf"^model\.layers\.{i}\.self_attn\.q_proj": rank for i, rank in enumerate((4, 2, 4))
    }
    for key, array in again.items():
        np.testing.assert_array_equal(array, read(tmp_path / "a")[1][key])
    same(peft.load_adapters(llama, tmp_path / "b")(IDS), found(IDS))


@pytest.mark.heavy
def test_experts_are_parameters(tmp_path):
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=64)
    config = LlamaConfig(**SIZES, model_type="mixtral", experts=experts)
    base = q4jax.quantize_model(Llama(config, rngs=nnx.Rngs(0)))
    adapted = fill(q4jax.add_lora(base, 4, 8))
    peft.save_adapters(adapted, tmp_path / "a")
    written, tensors = read(tmp_path / "a")
    assert written["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    start = f"{ROOT}model.layers.1.mlp.experts."
    shapes = {k.removeprefix(start): v.shape for k, v in tensors.items() if k.startswith(start)}
    assert shapes == {
        "base_layer.lora_A.weight": (32, 64),
        "base_layer.lora_B.weight": (128, 32),
        "lora_A.weight": (16, 64),
        "lora_B.weight": (64, 16),
    }
    found = peft.load_adapters(base, tmp_path / "a")
    same(found(IDS), adapted(IDS), 1e-5)
    peft.save_adapters(found, tmp_path / "b")  # the shared factor does not grow
    for key, array in read(tmp_path / "b")[1].items():
        np.testing.assert_array_equal(array, tensors[key])


class Projection(nnx.Module):
    """Another package's layer: heads in axes of their own."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (64, 4, 16)) / 8)

    def __call__(self, x):
        return jnp.einsum("bd,dnh->bnh", x, self.w[...])


q4jax.register_layer(Projection, lambda module: {"w": q4jax.KernelAxes((64, 4, 16), in_axes=(0,))})


@pytest.mark.parametrize(
    "make", [Projection, lambda rngs: nnx.LinearGeneral(64, (4, 16), rngs=rngs)]
)
@pytest.mark.parametrize("four_bit", [False, True])
def test_kernels_of_several_axes_are_linear_layers_there(make, four_bit, tmp_path):
    base = nnx.Dict(attention=nnx.Dict(q_proj=make(rngs=nnx.Rngs(0))))
    base = q4jax.quantize_model(base) if four_bit else base
    adapted = fill(q4jax.add_lora(base, 4, 8, targets=("q_proj",)))
    peft.save_adapters(adapted, tmp_path)
    config, tensors = read(tmp_path)
    name = f"{ROOT}model.attention.q_proj.lora_"
    assert {k: v.shape for k, v in tensors.items()} == {
        f"{name}A.weight": (4, 64),
        f"{name}B.weight": (64, 4),
    }
    assert config["target_modules"] == ["q_proj"]
    x = jnp.ones((2, 64))
    same(peft.load_adapters(base, tmp_path).attention.q_proj(x), adapted.attention.q_proj(x))


@pytest.mark.parametrize("four_bit", [False, True])
def test_copies_of_base_weights_must_be_the_model_s(llama, four_bit, tmp_path):
    rule = q4jax.QuantConfig(skip=("layers",))
    base = q4jax.quantize_model(llama, rule) if four_bit else llama
    adapted = fill(q4jax.add_lora(base, 4, 8, targets=("q_proj", "lm_head")))
    peft.save_adapters(adapted, tmp_path)
    head = np.asarray(llama.lm_head.kernel[...]).T
    embedding = np.asarray(llama.embed_tokens.embedding[...])
    copies = {"lm_head.base_layer.weight": head, "model.embed_tokens.weight": embedding}
    rewrite(tmp_path, {}, {ROOT + k: v for k, v in copies.items()})
    same(peft.load_adapters(base, tmp_path)(IDS), adapted(IDS))
    for name, copy in copies.items():
        for changed in (copy * 1.5, np.concatenate([copy, copy])):
            rewrite(tmp_path, {}, {ROOT + k: v for k, v in (copies | {name: changed}).items()})
            with pytest.raises(ValueError, match=f"{name} is a copy .* differs from the model's"):
                peft.load_adapters(base, tmp_path)


@pytest.mark.parametrize("four_bit", [False, True])
def test_whole_modules_replace_the_model_s_and_are_saved_again(llama, four_bit, tmp_path):
    base = q4jax.quantize_model(llama, skip=()) if four_bit else llama
    peft.save_adapters(fill(q4jax.add_lora(base, 4, 8, targets=("q_proj",))), tmp_path / "a")
    head = np.asarray(llama.lm_head.kernel[...]).T * 3
    norm = np.full(64, 2, np.float32)
    whole = {"lm_head.weight": head, "model.layers.1.input_layernorm.weight": norm}
    changes = {"modules_to_save": ["lm_head", "1.input_layernorm"]}
    rewrite(tmp_path / "a", changes, {ROOT + k: v for k, v in whole.items()})
    found = peft.load_adapters(base, tmp_path / "a")
    np.testing.assert_array_equal(found.lm_head.kernel[...].T, head)
    np.testing.assert_array_equal(found.layers.input_layernorm.scale[1], norm)
    assert (found.layers.input_layernorm.scale[0] != 2).all()
    peft.save_adapters(found, tmp_path / "b")
    config, tensors = read(tmp_path / "b")
    assert config["modules_to_save"] == ["lm_head", "model.layers.1.input_layernorm"]
    for name, array in whole.items():
        np.testing.assert_array_equal(tensors[ROOT + name], array)
    same(peft.load_adapters(base, tmp_path / "b")(IDS), found(IDS))
    with pytest.raises(NotImplementedError, match="modules_to_save"):
        peft.read_adapters(tmp_path / "b")


@pytest.mark.parametrize("four_bit", [False, True])
def test_dora_is_its_merge(four_bit, tmp_path):
    dense = nnx.Dict(proj=nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    dense.proj.bias[...] = jnp.arange(32.0)
    base = q4jax.quantize_model(dense) if four_bit else dense
    adapted = nnx.Dict(proj=LoRALinear4bit(base.proj, 4, 8, dora=True, rngs=nnx.Rngs(1)))
    x = jax.random.normal(jax.random.key(0), (3, 64))
    same(adapted.proj(x), base.proj(x), 1e-6)  # until it is trained
    fill(adapted)
    adapted.proj.magnitude[...] *= jnp.linspace(0.5, 2, 32)
    same(adapted.proj(x), q4jax.merge_lora(adapted).proj(x), 1e-5)
    peft.save_adapters(adapted, tmp_path)
    config, tensors = read(tmp_path)
    assert config["use_dora"] and f"{ROOT}model.proj.lora_magnitude_vector" in tensors
    same(peft.load_adapters(base, tmp_path).proj(x), adapted.proj(x))


def test_an_embedding_that_is_the_head_needs_a_tied_adapter(tmp_path):
    tied = Llama(LlamaConfig(**SIZES, tie_word_embeddings=True), rngs=nnx.Rngs(0))
    adapted = fill(q4jax.add_lora(tied, 4, 8, targets=("embed_tokens",)))
    peft.save_adapters(adapted, tmp_path)
    same(peft.load_adapters(tied, tmp_path)(IDS), adapted(IDS))
    rewrite(tmp_path, {"ensure_weight_tying": False}, {})
    with pytest.raises(NotImplementedError, match="ensure_weight_tying"):
        peft.load_adapters(tied, tmp_path)
