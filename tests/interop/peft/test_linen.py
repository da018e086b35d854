"""The adapters of Linen models in PEFT's files, as those of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import q4jax
from q4jax.interop import peft
from tests.support.trees import assert_same

NAMES = {"up": "layers.0.mlp.up_proj", "down": "layers.0.mlp.down_proj"}
FILES = ("adapter_config.json", "adapter_model.safetensors")
X = jnp.ones((2, 64))


class Model(nn.Module):
    layer: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        return self.layer(32, name="down")(nn.tanh(self.layer(96, name="up")(x)))


@pytest.fixture(scope="module", params=["any", "ours"])
def small(request):
    variables = Model().init(jax.random.key(0), X)
    if request.param == "any":
        return q4jax.linen.quantize_model(Model(), variables, X)
    return q4jax.linen.quantize_variables(variables, quant_type="nf4")


def with_values(lora):
    return jax.tree.map(lambda v: jnp.arange(v.size, dtype=v.dtype).reshape(v.shape), lora)


def test_files_are_those_of_nnx_and_come_back(small, tmp_path):
    variables = q4jax.linen.add_lora(small, 4, 8, targets=["up"], rslora=True)
    variables["lora"] = with_values(variables["lora"])
    peft.save_linen_adapters(variables, tmp_path / "linen", names=NAMES.get, base_model="a/b")

    rngs = nnx.Rngs(0)
    mlp = nnx.Dict(
        up_proj=q4jax.LinearNF4(64, 96, rngs=rngs), down_proj=q4jax.LinearNF4(96, 32, rngs=rngs)
    )
    layers = nnx.Dict(layers=nnx.List([nnx.Dict(mlp=mlp)]))
    model = q4jax.add_lora(layers, 4, 8, targets=["up_proj"], rslora=True)
    (factors,) = variables["lora"]["up"].values()
    adapted = model.layers[0].mlp.up_proj
    adapted.lora_a[...], adapted.lora_b[...] = factors.lora_a, factors.lora_b
    peft.save_adapters(model, tmp_path / "nnx", base_model="a/b")
    for name in FILES:
        assert (tmp_path / "linen" / name).read_bytes() == (tmp_path / "nnx" / name).read_bytes()

    found = peft.load_linen_adapters(small, tmp_path / "linen", names=NAMES.get)
    assert_same(found, variables)


def test_a_stack_is_numbered(tmp_path):
    def body(module, x, _):
        return module(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(nn.Dense(64, name="layers"), x, None)[0]

    small = q4jax.linen.quantize_model(Stack(), Stack().init(jax.random.key(0), X), X)
    variables = q4jax.linen.add_lora(small, 4, 8)
    variables["lora"] = with_values(variables["lora"])

    def names(path):
        return f"{path}.mlp.up_proj"

    peft.save_linen_adapters(variables, tmp_path, names=names)
    pairs = peft.read_adapters(tmp_path)[1]
    assert list(pairs) == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    factors = variables["lora"]["layers"]["kernel"]
    np.testing.assert_array_equal(pairs["model.layers.2.mlp.up_proj"][1], factors.lora_b[2].T)
    assert_same(peft.load_linen_adapters(small, tmp_path, names=names), variables)


def test_bad_input_is_named(small, tmp_path):
    with pytest.raises(ValueError, match="no adapter to save"):
        peft.save_linen_adapters(small, tmp_path)
    variables = q4jax.linen.add_lora(small, 4, 8)
    with pytest.raises(ValueError, match="two modules have the name 'up'"):
        peft.save_linen_adapters(variables, tmp_path, names=lambda path: "up")
    with pytest.raises(ValueError, match="must hold 4-bit weights"):
        peft.load_linen_adapters({"params": {}}, tmp_path)
    assert not list(tmp_path.iterdir())
