"""`load_state_dict`: torch state dicts into NNX models."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax import Params4bit
from q4jax.interop import bitsandbytes as bnb
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
