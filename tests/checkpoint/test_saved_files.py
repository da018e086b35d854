"""Files that 0.1.0's code saved load, whatever has been moved since: `saved_by_0_1_0/make.py`."""

import importlib.util
import pickle
import pickletools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import q4jax

FOLDER = Path(__file__).parent / "saved_by_0_1_0"


@pytest.fixture(scope="module")
def make():
    """The script that wrote the files, with today's code."""
    spec = importlib.util.spec_from_file_location("make_saved_files", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_pickles_of_weights(make):
    found = pickle.loads((FOLDER / "weights.pickle").read_bytes())
    spec, state = found.pop("spec"), found.pop("state")
    expected = make.weights()
    same(found, expected)
    same(state, expected["nested"].quant_state)
    assert spec == expected["nested"].quant_state.spec
    assert all(type(weight) is q4jax.Params4bit for weight in found.values())


def test_pickles_name_nothing_but_the_package(make):
    data = pickle.dumps(make.weights()["nested"])
    names = [arg for op, arg, _ in pickletools.genops(data) if "UNICODE" in op.name]
    assert "q4jax" in names
    assert not [name for name in names if name.startswith("q4jax.")]


def test_a_checkpoint_of_an_nnx_model(make):
    model = make.nnx_model()
    expected = nnx.split(model)[1]
    target = nnx.eval_shape(make.nnx_model)
    found = q4jax.checkpoint.restore(FOLDER / "nnx", target)
    assert type(found) is make.Model
    same(nnx.split(found)[1], expected)
    plain = q4jax.checkpoint.restore(FOLDER / "nnx")
    assert type(plain["proj"]["base"]["weight"]) is q4jax.Params4bit
    assert q4jax.fingerprint(plain) == q4jax.fingerprint(model)


def test_a_checkpoint_of_linen_variables(make):
    expected = make.linen_variables()
    same(q4jax.checkpoint.restore(FOLDER / "linen", expected), expected)
    same(q4jax.checkpoint.restore(FOLDER / "linen"), expected)
