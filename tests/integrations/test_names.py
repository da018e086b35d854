"""What is known of tunix's models without tunix."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.integrations import tunix
from q4jax.interop.safetensors.reader import TensorFile


class Einsum(nnx.Module):
    """As tunix has it: the weight is read as `self.w.value`."""

    def __init__(self, einsum_str, shape, rngs):
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w.value)


Einsum.__module__ = "tunix.models.gemma.model"


def attention(rngs):
    """The layers of tunix's Gemma."""
    return nnx.Dict(
        attn=nnx.Dict(
            q_einsum=Einsum("BTD,NDH->BTNH", (4, 64, 16), rngs),
            kv_einsum=Einsum("BSD,CKDH->CBSKH", (2, 2, 64, 16), rngs),
            attn_vec_einsum=Einsum("BTNH,NHD->BTD", (4, 16, 64), rngs),
        ),
        mlp=nnx.Dict(up_proj=nnx.Linear(64, 128, use_bias=False, rngs=rngs)),
    )


def make():
    rngs = nnx.Rngs(0)
    head = Einsum("BTD,DV->BTV", (64, 96), rngs)
    return nnx.Dict(layers=nnx.List([attention(rngs)]), lm_head=head)


@pytest.mark.slow
def test_layers_are_saved_as_the_modules_that_they_are(tmp_path):
    model = tunix.qlora_model(make(), 4, 8, rslora=True)
    kv = model.layers[0].attn.kv_einsum.w
    kv.lora_b[...] = jnp.arange(4 * 64.0).reshape(4, 64)
    tunix.save_adapters(model, tmp_path, base_model="google/gemma-2b")
    file = TensorFile(tmp_path / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0."
    modules = ["mlp.up_proj", *(f"self_attn.{n}_proj" for n in "kqov")]
    assert {*file} == {f"{start}{m}.lora_{f}.weight" for m in modules for f in "AB"}
    k, v = (file[f"{start}self_attn.{n}_proj.lora_B.weight"] for n in "kv")
    assert (k == np.asarray(kv.lora_b[...])[:, :32].T).all()
    assert (v == np.asarray(kv.lora_b[...])[:, 32:].T).all()
    for n in "kv":
        assert (file[f"{start}self_attn.{n}_proj.lora_A.weight"] == kv.lora_a[...].T).all()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["r"] == 4 and config["use_rslora"] and config["lora_alpha"] == 8


def test_a_module_without_adapter_keeps_its_name_free(tmp_path):
    model = make()
    model.layers.append(attention(nnx.Rngs(1)))
    model = tunix.qlora_model(model, 4, 8, targets=r"layers\.0\..*")
    tunix.save_adapters(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    own = ["mlp.up_proj", *(f"self_attn.{n}_proj" for n in "koqv")]
    assert config["target_modules"] == [f"model.layers.0.{name}" for name in own]


def test_outputs_and_the_head_keep_their_precision():
    small = q4jax.quantize_model(make(), tunix.quantization_rules(make()))
    assert isinstance(small.lm_head.w, nnx.Param)
    assert small.layers[0].attn.q_einsum.w.kernel_axes.matrix == (64, 64)
    x = jnp.ones((1, 3, 64))
    dense = q4jax.dequantize_model(small)
    found, expected = (m.layers[0].attn.kv_einsum(x) for m in (small, dense))
    assert found.shape == (2, 1, 3, 2, 16) and (found == expected).all()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tunix.models or bonsai.models, got a flax\..*\.Linear"):
        tunix.qlora_model(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), 4, 8)
    with pytest.raises(TypeError, match="model must be an nnx.Module, got int"):
        tunix.register_layers(3)
    with pytest.raises(ValueError, match=r"no layer is \['q_proj'\]"):
        tunix.qlora_model(make(), 4, 8, targets=["q_proj"])
    uneven = nnx.Dict(kv=q4jax.LinearNF4(64, 33, rngs=nnx.Rngs(0)))
    adapted = q4jax.add_lora(uneven, 4, 8)
    with pytest.raises(ValueError, match=r"33 outputs are not 2 even parts: \('k', 'v'\)"):
        q4jax.interop.peft.save_adapters(adapted, tmp_path, names=lambda path: ("k", "v"))
    assert not list(tmp_path.iterdir())
