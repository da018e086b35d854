"""`QuantConfig`: which modules an entry of `skip` keeps dense."""

import tempfile

import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.interop import huggingface

# What transformers' llm_int8_skip_modules means, and what a name within a path means besides.
ENTRIES = {
    "lm_head": {"lm_head"},
    "head": {"lm_head"},  # the end of a path
    "model.layers.1": {"model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"},
    "layers.1": {"model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"},
    "model.layers.*.mlp": {
        "model.layers.1.mlp.up_proj",
        "model.layers.11.mlp.up_proj",
        "model.layers.11.mlp.gate",
    },
    r"model\.layers\.\d\.": {"model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"},
    "model.layers.1.": {  # a dot is any character, and the pattern may end at a dot
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.mlp.up_proj",
        "model.layers.11.mlp.gate",
    },
    "mlp.gate": {"model.layers.11.mlp.gate"},
    "mlp.up_proj": {"model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"},
    "mlp.up": set(),
    "odel.layers": set(),
    "model.layers.1.mlp|lm_head": {"model.layers.1.mlp.up_proj", "lm_head"},
}
PATHS = [
    "model.layers.1.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.layers.11.mlp.gate",
    "lm_head",
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_mean_what_they_mean_in_transformers(entry):
    config = q4jax.QuantConfig(skip=(entry,))
    assert {path for path in PATHS if config.skips(path)} == ENTRIES[entry]


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (("",), "skip has an empty name"),
        (("*.mlp",), r"skip has '\*\.mlp', which is no regular expression"),
        ("lm_head", "skip must be a tuple of names, got 'lm_head'"),
        (None, "skip must be a tuple of names, got None"),
        ((1,), r"skip must be a tuple of names, got \(1,\)"),
    ],
)
def test_other_entries_are_refused(skip, message):
    with pytest.raises(ValueError, match=message):
        q4jax.QuantConfig(skip=skip)


def test_an_entry_that_matches_no_module_is_an_error():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(up=nnx.Linear(64, 64, rngs=rngs), norm=nnx.LayerNorm(64, rngs=rngs))
    with pytest.raises(ValueError, match="skip has 'lm_haed', which no module matches.*norm, up"):
        q4jax.quantize_model(model, skip=("lm_haed",))
    # A module that is no linear layer may be named, and a head that the model does not have.
    small = q4jax.quantize_model(model, skip=("lm_head", "norm"))
    assert isinstance(small.up, q4jax.Linear4bit)


def _in_nnx(skip):
    rngs = nnx.Rngs(0)
    mlp = nnx.Dict(up=nnx.Linear(64, 64, rngs=rngs), drop=nnx.Dropout(0.5, rngs=rngs))
    mlp.scales = nnx.List([nnx.Param(jnp.ones(3))])
    q4jax.quantize_model(nnx.Dict(mlp=mlp, head=nnx.Linear(64, 64, rngs=rngs)), skip=skip)


def _in_linen(skip):
    layer = {"kernel": jnp.ones((64, 64))}
    variables = {"params": {"mlp": {"up": layer, "scales": {"0": jnp.ones(3)}}, "head": layer}}
    q4jax.linen.quantize_variables(variables, skip=skip)


def _in_a_directory(skip):
    names = ("mlp.up.weight", "mlp.scales.0", "head.weight")
    with tempfile.TemporaryDirectory() as path:
        huggingface.save_directory({name: jnp.ones((64, 64)) for name in names}, path, {})
        config = q4jax.QuantConfig(skip=skip)
        huggingface.load_directory(path, config, select=lambda name, _: name.endswith("weight"))


@pytest.mark.parametrize("quantize", [_in_nnx, _in_linen, _in_a_directory])
def test_an_entry_that_keeps_no_parameters_is_an_error(quantize):
    """The end of a parent's path keeps nothing below it."""
    for skip in ("mlp", "mlp.up", "up", "p", "scales", "ales"):
        quantize((skip,))
    for skip in ("lp", "ml"):
        message = rf"skip has '{skip}', which no module matches.*mlp\.up"
        with pytest.raises(ValueError, match=message):
            quantize((skip,))


def test_a_module_without_parameters_is_nothing_to_keep():
    with pytest.raises(ValueError, match="skip has 'drop', which no module matches"):
        _in_nnx(("drop",))


def test_any_iterable_of_names_is_read_once():
    config = q4jax.QuantConfig(skip=(name for name in ["lm_head", "norm"]))
    assert config.skip == ("lm_head", "norm")
    for skip in ("lm_head", 3, [None]):
        with pytest.raises(ValueError, match="llm_int8_skip_modules must be a tuple of names"):
            q4jax.QuantConfig.from_bnb_config({"load_in_4bit": True, "llm_int8_skip_modules": skip})


def test_the_blocksize_of_a_bitsandbytes_config_is_taken():
    config = {"load_in_4bit": True, "bnb_4bit_blocksize": 128}
    assert q4jax.QuantConfig.from_bnb_config(config).blocksize == 128
    with pytest.raises(ValueError, match="blocksize"):
        q4jax.QuantConfig.from_bnb_config({**config, "bnb_4bit_blocksize": 100})
