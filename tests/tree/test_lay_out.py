"""`lay_out`, on a CPU, which keeps layouts too: where arrays come from, the bytes stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout

import q4jax
from q4jax import checkpoint
from q4jax.models import Llama, LlamaConfig, from_pretrained, save_pretrained
from q4jax.tree.lay_out import lay_out
from q4jax.tree.leaves import find_weights, leaves
from tests.support.random_arrays import normal

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)


def order(array):
    return array.format.layout.major_to_minor


def orders(tree):
    """The orders of codes and scales of all weights of a tree."""
    weights = find_weights(leaves(tree)).values()
    return {(order(w.packed), order(w.quant_state.absmax)) for w in weights}


def same(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def model():
    return q4jax.quantize_model(Llama(CONFIG, rngs=nnx.Rngs(0)), quant_type="nf4", blocksize=32)


ROWS_MINOR, DEFAULT = {((0, 2, 1),) * 2}, {((0, 1, 2),) * 2}


def test_a_model_that_was_quantized(model):
    placed = lay_out(model)
    assert orders(placed) == ROWS_MINOR
    assert orders(model) == DEFAULT, "a new tree"
    assert same(nnx.state(placed), nnx.state(model))
    tokens = jnp.zeros((1, 4), jnp.int32)
    np.testing.assert_array_equal(placed(tokens), model(tokens))


def test_only_what_the_kernels_serve_moves():
    flat = q4jax.Params4bit.quantize(normal(0, 70, 192), 128, False, "nf4")
    plain = q4jax.Params4bit.quantize(normal(0, 70, 192), 64, False, "nf4")
    tree = {"flat": flat, "plain": plain, "dense": jnp.ones((2, 3))}
    placed = lay_out(tree)
    assert placed["flat"].packed is flat.packed
    assert placed["dense"] is tree["dense"]
    assert order(placed["plain"].packed) == order(placed["plain"].quant_state.absmax) == (1, 0)


def test_a_checkpoint_comes_back_as_its_target_lies(model, tmp_path):
    checkpoint.save(tmp_path / "saved", model)
    for target in (lay_out(model), lay_out(nnx.eval_shape(lambda: model))):
        found = checkpoint.restore(tmp_path / "saved", target)
        assert orders(found) == ROWS_MINOR
        assert same(nnx.state(found), nnx.state(model))
    assert orders(checkpoint.restore(tmp_path / "saved", model)) == DEFAULT


def test_weights_that_are_loaded_lie_as_a_function_says(model, tmp_path):
    save_pretrained(model, tmp_path / "pretrained")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def rows_minor(name, array):
        codes_or_scales = name.endswith((".packed", ".absmax")) and array.ndim == 3
        return Format(Layout((0, 2, 1)), here) if codes_or_scales else here

    found = from_pretrained(tmp_path / "pretrained", sharding=rows_minor)
    assert orders(found) == ROWS_MINOR
    assert orders(lay_out(from_pretrained(tmp_path / "pretrained"))) == ROWS_MINOR
    assert same(nnx.state(found), nnx.state(model))


@pytest.mark.parametrize("updates", [False, True])
def test_a_program_that_returns_weights_returns_the_default_layout(model, updates):
    """Therefore docs/tpu_kernels.md asks for graph_updates=False."""
    placed = lay_out(model)
    nnx.jit(lambda model: model.lm_head.kernel.sum(), graph_updates=updates)(placed)
    assert orders(placed) == (DEFAULT if updates else ROWS_MINOR)
