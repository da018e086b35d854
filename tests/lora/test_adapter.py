"""Adapters: neutral at first, trained alone, merged with their error."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import q4jax
from q4jax.lora import LoRALinear4bit
from q4jax.nnx.variables import to_variables

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def model():
    dense = nnx.Sequential(
        nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(128, 32, rngs=nnx.Rngs(1))
    )
    return q4jax.quantize_model(dense)


X = jax.random.normal(jax.random.key(2), (16, 64))


def train(model, steps=5):
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.LoRAParam)
    target = jnp.sin(X[:, :32])

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return ((model(X) - target) ** 2).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_new_adapters_change_nothing(model):
    adapted = q4jax.add_lora(model, rank=4, alpha=8)
    assert np.array_equal(adapted(X), model(X))
    assert type(model.layers[0]) is q4jax.Linear4bit
    a = adapted.layers[0].lora_a[...]
    assert a.shape == (64, 4) and 0.05 < float(a.std()) < 0.08  # uniform in ±1/8
    assert not adapted.layers[0].lora_b[...].any()


def test_training_moves_adapters_and_nothing_else(model):
    adapted = q4jax.add_lora(model, rank=4, alpha=8)
    print_before = q4jax.fingerprint(adapted)
    biases = [np.asarray(layer.base.bias[...]) for layer in adapted.layers[::2]]
    losses = train(adapted)
    assert losses == sorted(losses, reverse=True)
    assert q4jax.fingerprint(adapted) == print_before
    for layer, bias in zip(adapted.layers[::2], biases, strict=True):
        assert np.array_equal(layer.base.bias[...], bias)


def test_forward_is_base_plus_scaled_product(model):
    adapted = q4jax.add_lora(model, rank=4, alpha=8, targets=("0",))
    assert type(adapted.layers[2]) is q4jax.Linear4bit
    layer = adapted.layers[0]
    layer.lora_b[...] = jax.random.normal(jax.random.key(3), (4, 128))
    expected = layer.base(X) + X @ layer.lora_a[...] @ layer.lora_b[...] * 2.0
    np.testing.assert_allclose(layer(X), expected, rtol=0, atol=1e-5)
    assert layer(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_merged_model_computes_the_same(model):
    adapted = q4jax.add_lora(model, rank=4, alpha=8)
    train(adapted)
    merged = q4jax.merge_lora(adapted)
    assert type(merged.layers[0]) is nnx.Linear
    np.testing.assert_allclose(merged(X), adapted(X), rtol=0, atol=1e-5)


def test_requantized_merge_reports_its_true_error(model):
    adapted = q4jax.add_lora(model, rank=4, alpha=8)
    train(adapted)
    merged, errors = q4jax.merge_lora(adapted, requantize=True)
    dense = q4jax.merge_lora(adapted)
    assert errors.keys() == {"layers.0", "layers.2"}
    for i in (0, 2):
        kernel = np.asarray(dense.layers[i].kernel[...])
        again = np.asarray(q4jax.dequantize_model(merged).layers[i].kernel[...])
        expected = np.linalg.norm(again - kernel) / np.linalg.norm(kernel)
        assert errors[f"layers.{i}"] == pytest.approx(expected, rel=1e-5)
        assert 0.01 < expected < 0.12
    assert merged.layers[0].weight.quant_state.spec == model.layers[0].weight.quant_state.spec


def test_stacked_layers_get_stacked_adapters():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(64, 64, rngs=rngs)

    stack = q4jax.add_lora(q4jax.quantize_model(make(nnx.Rngs(0))), rank=4, alpha=8)
    assert stack.lora_a[...].shape == (3, 64, 4)
    stack.lora_b[...] = jax.random.normal(jax.random.key(3), (3, 4, 64)) * 0.1

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    merged = q4jax.merge_lora(stack)
    np.testing.assert_allclose(run(stack, X), run(merged, X), rtol=0, atol=1e-4)


def test_refusals(model):
    adapted = q4jax.add_lora(model, rank=4, alpha=8)
    with pytest.raises(ValueError, match=r"an adapter already at layers\.0"):
        q4jax.add_lora(adapted, rank=4, alpha=8)
    with pytest.raises(ValueError, match=r"targets=\('q_proj',\).*layers\.0.*layers\.2"):
        q4jax.add_lora(model, rank=4, alpha=8, targets=("q_proj",))
    with pytest.raises(ValueError, match=r"layers with a 4-bit weight .*: \['\(root\)'\]"):
        q4jax.add_lora(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), rank=4, alpha=8)
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"rank must be a positive integer, got {rank}"):
            q4jax.add_lora(model, rank=rank, alpha=8)
    with pytest.raises(ValueError, match="the model has no adapter"):
        q4jax.merge_lora(model)
    for function in (lambda m: q4jax.add_lora(m, rank=4, alpha=8), q4jax.merge_lora):
        with pytest.raises(TypeError, match="model must be an nnx.Module, got dict"):
            function({"params": {}})


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_golden_peft(quant_type):
    """Forward, gradients and merge of PEFT's LoRA on a bitsandbytes layer: r=4, alpha=12."""
    d = load_file(GOLDEN / "linear4bit" / f"lora_{quant_type}.safetensors")
    nested = quant_type == "nf4"
    base = q4jax.Linear4bit(
        128, 96, use_bias=False, quant_type=quant_type, compress_statistics=nested, rngs=nnx.Rngs(0)
    )
    settings = {"quant_type": quant_type, "compress_statistics": nested}
    base.weight = to_variables(q4jax.Params4bit.quantize(jnp.asarray(d["w_orig"]), **settings))
    layer = LoRALinear4bit(base, 4, 12, rngs=nnx.Rngs(0))
    layer.lora_a[...] = jnp.asarray(d["lora_A"].T)
    layer.lora_b[...] = jnp.asarray(d["lora_B"].T)

    def close(ours, golden, tolerance=2e-6):
        limit = tolerance * np.abs(golden).max()
        np.testing.assert_allclose(np.asarray(ours), golden, rtol=0, atol=limit)

    x, g = jnp.asarray(d["x"]), jnp.asarray(d["g"])
    # bitsandbytes' nested codes are one off in a few of a thousand; so is what follows from them.
    tolerance = 5e-3 if nested else 2e-6
    close(layer(x), d["y"], tolerance)

    def inner(layer, x):
        return (layer(x) * g).sum()

    grads, dx = nnx.grad(inner, argnums=(nnx.DiffState(0, nnx.LoRAParam), 1))(layer, x)
    close(dx, d["dx"], tolerance)
    close(grads["lora_a"][...].T, d["dA"])
    close(grads["lora_b"][...].T, d["dB"])

    merged, _ = q4jax.merge_lora(layer, requantize=True)
    codes = np.asarray(merged.weight.packed[...]).ravel()
    differing = (codes != d["merged_packed"].ravel()).sum()
    assert differing <= (3 if nested else 0)


def test_dropout_is_on_in_training_only():
    plain = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    model = q4jax.add_lora(plain, 4, 8.0, dropout=0.5)
    model.lora_b[...] = jnp.ones((4, 32))
    x = jnp.ones((2, 64))
    first, second = model(x), model(x)
    assert jnp.abs(first - second).max() > 0
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    model.dropout = None
    still = q4jax.add_lora(plain, 4, 8.0)
    still.lora_b[...] = jnp.ones((4, 32))
    np.testing.assert_array_equal(model(x), still(x))
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1"):
        q4jax.add_lora(plain, 4, 8.0, dropout=1)


def test_dropout_differs_between_stacked_layers():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs):
        return nnx.Linear(64, 64, rngs=rngs)

    model = q4jax.add_lora(q4jax.quantize_model(stack(nnx.Rngs(0))), 4, 8.0, dropout=0.5)
    masks = nnx.vmap(lambda layer: layer.dropout(jnp.ones(64)))(model)
    assert masks.shape == (2, 64)
    assert set(np.unique(masks)) == {0.0, 2.0}
    assert (masks[0] != masks[1]).any()


def test_rank_stabilized_scale():
    plain = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    model = q4jax.add_lora(plain, 16, 8.0, rslora=True)
    model.lora_a[...], model.lora_b[...] = jnp.ones((64, 16)), jnp.ones((16, 32))
    delta = model(jnp.ones((1, 64))) - model.base(jnp.ones((1, 64)))
    np.testing.assert_allclose(delta, 64 * 16 * 8 / 4, rtol=1e-6)
    merged = q4jax.merge_lora(model)
    np.testing.assert_allclose(merged(jnp.ones((1, 64))), model(jnp.ones((1, 64))), rtol=1e-6)


def test_no_gradient_of_a_whole_output_is_transposed(model):
    """With several axes of rows, XLA's CPU compiler would copy it for the gradient of lora_b."""
    adapted = q4jax.add_lora(model, rank=4, alpha=8)
    graphdef, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    rows = X.reshape(2, 8, 64)

    def loss(adapters, rows):
        return (nnx.merge(graphdef, adapters, rest)(rows) ** 2).sum()

    text = jax.jit(jax.grad(loss)).lower(adapters, rows).compile().as_text()
    assert "f32[16,128]" in text  # the rows of the first layer's output
    assert "f32[128,2,8]" not in text and "f32[128,16]" not in text
    gradients, flat = (jax.jit(jax.grad(loss))(adapters, x) for x in (rows, X))
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(flat), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
