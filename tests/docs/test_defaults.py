"""The table of defaults in docs/quantize.md says what the signatures say."""

import ast
import inspect
import pydoc
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import q4jax

SETTINGS = ("quant_type", "blocksize", "compress_statistics")
SECTION = (
    (Path(__file__).parents[2] / "docs" / "quantize.md")
    .read_text("utf-8")
    .split("\n## Defaults\n")[1]
    .split("\n## ")[0]
)
TAKE_A_CONFIG = ("quantize_model", "linen.quantize_model", "models.from_pretrained")
LAYERS_OF_LINEN = ("linen.Linear4bit", "linen.Embedding4bit")


def rows():
    """(name, values) of every name in the table."""
    header, _, *lines = [line.strip("|").split("|") for line in SECTION.splitlines() if "|" in line]
    assert tuple(re.findall(r"`(\w+)`", "".join(header))) == SETTINGS
    for names, *cells in lines:
        values = tuple(ast.literal_eval(cell.strip(" `")) for cell in cells)
        for name in re.findall(r"`([\w.]+)[^`]*`", names):
            if name == "q4jax.linen":
                yield from ((layer, values) for layer in LAYERS_OF_LINEN)
            else:
                yield name.replace("from_pretrained", "models.from_pretrained"), values


ROWS = dict(rows())


def parameters(name):
    found = pydoc.locate(f"q4jax.{name}")
    return inspect.signature(found.__init__ if inspect.isclass(found) else found).parameters


@pytest.mark.parametrize("name", sorted(ROWS.keys() - set(TAKE_A_CONFIG)))
def test_defaults_are_those_of_the_table(name):
    assert tuple(parameters(name)[setting].default for setting in SETTINGS) == ROWS[name]


def test_the_table_has_everything_with_settings():
    public = [*q4jax.__all__, *(f"linen.{name}" for name in q4jax.linen.__all__)]
    having = {
        name
        for name in public
        if callable(pydoc.locate(f"q4jax.{name}")) and set(SETTINGS) <= set(parameters(name))
    }
    assert having == ROWS.keys() - {*TAKE_A_CONFIG, "Params4bit.quantize"}


def test_models_have_the_defaults_of_their_config():
    assert {ROWS[name] for name in TAKE_A_CONFIG} == {ROWS["QuantConfig"]}
    assert parameters("quantize_model")["config"].default is None
    assert parameters("linen.quantize_model")["config"].default is None
    assert parameters("models.from_pretrained")["quantization"].default is None
    weights = [q4jax.quantize_model(nnx.Linear(64, 64, rngs=nnx.Rngs(0))).weight]
    model, x = nn.Dense(64), jnp.ones((1, 64))
    variables = q4jax.linen.quantize_model(model, model.init(jax.random.key(0), x), x)
    weights.append(variables["quant"]["kernel"].weight)
    for weight in weights:
        spec = weight.quant_state.spec
        assert (spec.quant_type, spec.blocksize, spec.nested) == ROWS["QuantConfig"]


@pytest.mark.parametrize("kind", ["NF4", "FP4"])
def test_the_type_of_a_layer_is_in_its_name(kind):
    key = jax.random.key(0)
    linear, embedding = (getattr(q4jax, f"{name}{kind}") for name in ("Linear", "Embedding"))
    layers = [cls(64, 64, rngs=nnx.Rngs(0)) for cls in (linear, embedding)]
    linear, embedding = (getattr(q4jax.linen, f"{name}{kind}") for name in ("Linear", "Embedding"))
    weights = [
        *(layer.weight for layer in layers),
        linear(64).init(key, jnp.ones((1, 64)))["quant"]["weight"],
        embedding(64, 64).init(key, jnp.zeros(1, int))["quant"]["embedding"],
    ]
    for weight in weights:
        spec = weight.quant_state.spec
        found = (spec.quant_type, spec.blocksize, spec.nested)
        assert found == (kind.lower(), *ROWS["Linear4bit"][1:])


def test_a_config_of_bitsandbytes_has_its_defaults():
    config = q4jax.QuantConfig.from_bnb_config({"load_in_4bit": True})
    assert (config.quant_type, config.blocksize, config.compress_statistics) == ("fp4", 64, False)
