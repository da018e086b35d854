"""`load_state_dict` and `named_parameters`: NNX models from and to torch state dicts."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax import Params4bit
from q4jax.interop import bitsandbytes as bnb
from q4jax.interop import huggingface
from q4jax.nnx.variables import from_variables
from tests.support.trees import assert_same


def model(linear=q4jax.LinearNF4):
    rngs = nnx.Rngs(0)
    layers = [linear(128, 96, rngs=rngs), nnx.RMSNorm(96, rngs=rngs), nnx.Linear(96, 5, rngs=rngs)]
    return nnx.Sequential(*layers)


def strip(path):
    return path.removeprefix("layers.")


@pytest.fixture(scope="module")
def full():
    rng = np.random.default_rng(3)
    shapes = {"0.weight": (96, 128), "0.bias": (96,), "1.weight": (96,), "2.weight": (5, 96)}
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    return arrays | {"2.bias": np.ones(5, np.float32)}


def test_full_precision_is_quantized_on_load(full):
    before = model()
    found = bnb.load_state_dict(before, full, names=strip)
    quantized = Params4bit.quantize(jnp.asarray(full["0.weight"]), 64, True, "nf4")
    assert_same(from_variables(found.layers[0].weight), quantized)
    np.testing.assert_array_equal(found.layers[2].kernel[...], full["2.weight"].T)
    assert q4jax.fingerprint(before) == q4jax.fingerprint(model())
    # And what was quantized goes into another model as it is.
    mixed = full | quantized.state_dict("0.weight")
    assert q4jax.fingerprint(bnb.load_state_dict(before, mixed, names=strip)) == (
        q4jax.fingerprint(found)
    )
    x = jnp.ones((2, 128))
    dense = q4jax.dequantize_model(found)
    np.testing.assert_allclose(found(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("0.bias"), r"state_dict has no \['0.bias'\]"),
        (lambda d: d.update(other=np.ones(1)), r"unknown keys the model lacks: \['other'\]"),
        (lambda d: d.update({"0.weight": d["0.weight"].T}), r"0.weight is float32\[128, 96\]"),
        (lambda d: d.update({"2.weight": d["2.weight"].T}), r"2.weight is float32\[96, 5\]"),
        (lambda d: d.update({"1.weight": np.ones(96, int)}), r"1.weight is int64\[96\]"),
        (lambda d: d["0.weight"].__setitem__(0, np.nan), "0.weight holds NaN"),
        (
            lambda d: d.update(Params4bit.quantize(jnp.ones((96, 128))).state_dict("0.weight")),
            "0.weight is .*fp4_b64_n0_.*, the model's is .*nf4_b64_n256",
        ),
        (
            lambda d: d.update(Params4bit.quantize(jnp.ones((5, 96))).state_dict("2.weight")),
            "the layer of the model is not 4-bit",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_the_model(full, edit, message):
    state_dict = {name: array.copy() for name, array in full.items()}
    edit(state_dict)
    with pytest.raises(ValueError, match=message):
        bnb.load_state_dict(model(), state_dict, names=strip)


def test_extra_keys_for_a_model_are_reported(full):
    with pytest.warns(UserWarning, match=r"keys the model lacks: \['other'\]"):
        bnb.load_state_dict(model(), full | {"other": np.ones(1)}, names=strip, strict=False)


def test_variables_without_a_name_in_torch(full):
    with pytest.raises(TypeError, match=r"conv.bias of a Conv has no name"):
        bnb.load_state_dict(nnx.Dict(conv=nnx.Conv(1, 1, (1,), rngs=nnx.Rngs(0))), full)


class Classifier(nnx.Module):
    def __init__(self, linear, rngs):
        self.embed = q4jax.EmbeddingNF4(16, 64, rngs=rngs)
        self.up = linear(64, 128, rngs=rngs)
        self.norm = nnx.LayerNorm(128, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        split = nnx.split_rngs(splits=3)
        self.stack = split(nnx.vmap(lambda rngs: nnx.Linear(128, 8, rngs=rngs)))(rngs)


def test_a_model_goes_to_files_and_back(tmp_path):
    before = Classifier(q4jax.LinearNF4, nnx.Rngs(1))
    names = lambda path: f"net.{path}"  # noqa: E731
    weights = bnb.named_parameters(before, names=names)
    assert sorted(weights) == [
        *("net.embed.weight", "net.norm.bias", "net.norm.weight", "net.stack.bias"),
        *("net.stack.weight", "net.up.bias", "net.up.weight"),
    ]
    assert weights["net.stack.weight"].shape == (3, 8, 128)
    bnb.save_file(weights, tmp_path / "f.safetensors")
    huggingface.save_directory(weights, tmp_path / "d", {"model_type": "own"})
    after = Classifier(q4jax.LinearNF4, nnx.Rngs(2))
    assert q4jax.fingerprint(after) != q4jax.fingerprint(before)
    for found in (
        bnb.load_file(tmp_path / "f.safetensors"),
        huggingface.load_directory(tmp_path / "d"),
    ):
        loaded = bnb.load_state_dict(after, bnb.to_state_dict(found), names=names)
        assert_same(nnx.state(loaded, nnx.Param), nnx.state(before, nnx.Param))
        assert q4jax.fingerprint(loaded) == q4jax.fingerprint(before)


def test_what_has_no_name_in_torch_is_not_left_out():
    rngs = nnx.Rngs(0)
    adapted = q4jax.add_lora(nnx.Dict(up=q4jax.LinearNF4(64, 32, rngs=rngs)), rank=2, alpha=4)
    statistics = nnx.Dict(norm=nnx.BatchNorm(8, use_scale=False, use_bias=False, rngs=rngs))
    for module, name in (
        (adapted, r"up\.lora_. of a LoRALinear4bit"),
        (statistics, r"norm\.mean of a BatchNorm"),
        (nnx.List([nnx.Param(jnp.ones(3))]), "0 of a List"),
    ):
        with pytest.raises(TypeError, match=f"^{name} has no name in a state dict"):
            bnb.named_parameters(module)
    with pytest.raises(TypeError, match="model must be an nnx.Module, got dict"):
        bnb.named_parameters({})
    with pytest.raises(ValueError, match="two weights of the model are named 'x.weight'"):
        bnb.named_parameters(model(), names=lambda _: "x")
