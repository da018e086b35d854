"""LoRA for Linen: the numbers of NNX, in both kinds of models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization

import q4jax
from q4jax.linen import LinearNF4, add_lora, merge_lora, merge_quantized, quantize_model
from q4jax.linen.adapter import LoRAFactors
from tests.support.trees import assert_same

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 64))
Y = jax.random.normal(jax.random.key(2), (3, 32))


class Dense(nn.Module):
    """Two layers of a kind, "up" and "down"."""

    layer: type = nn.Dense

    @nn.compact
    def __call__(self, x):
        return self.layer(32, name="down")(nn.tanh(self.layer(96, name="up")(x)))


class InNNX(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(96, 32, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


def as_nnx(params, lora, weights):
    """The same model in NNX, with the same arrays."""
    model = InNNX()
    for name in ("up", "down"):
        layer = getattr(model, name)
        layer.kernel[...], layer.bias[...] = params[name]["kernel"], params[name]["bias"]
    model = q4jax.add_lora(q4jax.quantize_model(model), 4, 8, rslora=True)
    for name in ("up", "down"):
        factors = lora[name][weights]
        adapted = getattr(model, name)
        adapted.lora_a[...], adapted.lora_b[...] = factors.lora_a, factors.lora_b
    return model


def randomize(lora):
    """The adapters with random values in the place of zeros."""
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    new = [jax.random.normal(k, v.shape, v.dtype) / 8 for k, v in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, new)


def both(kind):
    """(apply, variables with adapters, name of their weights, the dense variables)."""
    dense = Dense()
    variables = dense.init(KEY, X)
    if kind == "any":
        small = quantize_model(dense, variables, X)
        return lambda v: dense.apply(merge_quantized(v), X), small, "kernel", variables
    model = Dense(LinearNF4)
    small = q4jax.linen.quantize_variables(variables, quant_type="nf4")
    return lambda v: model.apply(v, X), small, "weight", variables


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any", "ours"])
def test_outputs_gradients_and_steps_are_those_of_nnx(kind):
    apply, small, weights, dense = both(kind)
    variables = add_lora(small, 4, 8, rslora=True)
    assert (apply(variables) == apply(small)).all()
    lora = randomize(variables["lora"])
    model = as_nnx(dense["params"], lora, weights)

    def loss(lora):
        return ((apply({**variables, "lora": lora}) - Y) ** 2).sum()

    def loss_nnx(model):
        return ((model(X) - Y) ** 2).sum()

    tx = optax.adam(1e-2)
    state, optimizer = tx.init(lora), nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for _ in range(3):
        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(grads, state)
        lora = optax.apply_updates(lora, updates)
        expected, found = nnx.value_and_grad(loss_nnx, argnums=nnx.DiffState(0, nnx.LoRAParam))(
            model
        )
        optimizer.update(model, found)
        np.testing.assert_allclose(value, expected, rtol=2e-6)
        for name in ("up", "down"):
            ours, theirs = lora[name][weights], getattr(model, name)
            np.testing.assert_allclose(ours.lora_a, theirs.lora_a[...], rtol=1e-4, atol=2e-6)
            np.testing.assert_allclose(ours.lora_b, theirs.lora_b[...], rtol=1e-4, atol=2e-6)
    assert value < ((apply(small) - Y) ** 2).sum() * 2
    merged = nnx.state(q4jax.merge_lora(model), nnx.Param)
    if kind == "any":
        own = merge_lora({**variables, "lora": lora})
        assert own.keys() == {"params"}
        for name in ("up", "down"):
            kernel = getattr(merged, name).kernel[...]
            np.testing.assert_allclose(own["params"][name]["kernel"], kernel, rtol=1e-4, atol=2e-6)
    again = merge_lora({**variables, "lora": lora}, requantize=True)
    back, _ = q4jax.merge_lora(model, requantize=True)
    assert again.keys() == {"params", "quant"}
    # A code may differ where a value is at the border of two, by what the steps round.
    np.testing.assert_allclose(apply(again), back(X), atol=0.05)
    assert np.abs(apply(again) - apply({**variables, "lora": lora})).max() < 0.6


def test_a_merged_weight_is_quantized_as_nnx_does():
    apply, small, _, dense = both("ours")
    lora = randomize(add_lora(small, 4, 8, rslora=True)["lora"])
    again = merge_lora({**small, "lora": lora}, requantize=True)
    model, _ = q4jax.merge_lora(as_nnx(dense["params"], lora, "weight"), requantize=True)
    for name in ("up", "down"):
        ours, theirs = again["quant"][name]["weight"], getattr(model, name).weight
        assert ours.quant_state.spec == theirs.quant_state.spec
        assert (ours.packed == theirs.packed[...]).all()
    with pytest.raises(ValueError, match=r"(up|down)/weight.*requantize=True"):
        merge_lora({**small, "lora": lora})
    del apply


class Scanned(nn.Module):
    layer: type

    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            return module(x), None

        axes = {"params": 0, "quant": 0, "lora": 0}
        stack = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=3)
        return stack(self.layer(64, name="layers"), x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any", "ours"])
def test_a_stack_has_an_adapter_for_each_layer(kind):
    dense = Scanned(nn.Dense)
    variables = dense.init(KEY, X)
    if kind == "any":
        small = quantize_model(dense, variables, X)
        model, place = dense, merge_quantized
    else:
        small = q4jax.linen.quantize_variables(variables, quant_type="nf4")
        model, place = Scanned(LinearNF4), dict
    small = add_lora(small, 4, 8)
    lora = randomize(small["lora"])
    (factors,) = jax.tree.leaves(lora, is_leaf=lambda node: isinstance(node, LoRAFactors))
    assert factors.lora_a.shape == (3, 64, 4)
    weight = jax.tree.leaves(small["quant"], is_leaf=lambda n: isinstance(n, q4jax.Params4bit))[0]
    weight = getattr(weight, "weight", weight)
    kernels = jnp.swapaxes(weight.dequantize(), -1, -2)
    kernels = kernels + jnp.matmul(factors.lora_a, factors.lora_b) * 2
    expected = X
    for kernel in kernels:
        expected = expected @ kernel + 0
    found = model.apply(place({**small, "lora": lora}), X)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_targets_are_names_or_expressions():
    _, small, weights, _ = both("any")
    assert add_lora(small, 4, 8, targets=["up"])["lora"].keys() == {"up"}
    assert add_lora(small, 4, 8, targets="d.*")["lora"].keys() == {"down"}
    with pytest.raises(ValueError, match=r"q_proj.*\['down', 'up'\]"):
        add_lora(small, 4, 8, targets=["q_proj"])
    del weights


def test_bad_input_is_named():
    _, small, _, dense = both("any")
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        add_lora(small, 0, 8)
    with pytest.raises(ValueError, match="adapters already, in the collection 'lora'"):
        add_lora(add_lora(small, 4, 8), 4, 8)
    with pytest.raises(ValueError, match="must hold 4-bit weights .* in 'quant'"):
        add_lora(dense, 4, 8)
    with pytest.raises(ValueError, match="no adapters in 'lora'; add_lora makes them"):
        merge_lora(small)
    lost = {**add_lora(small, 4, 8), "quant": {}}
    with pytest.raises(ValueError, match="the adapter (up|down)/kernel has no 4-bit weight"):
        merge_lora(lost)


@pytest.mark.parametrize("kind", ["any", "ours"])
def test_the_report_counts_adapters_as_trained(kind):
    _, small, _, _ = both(kind)
    variables = add_lora(small, 4, 8)
    report = q4jax.memory_report(variables)
    elements = 4 * (64 + 96) + 4 * (96 + 32)
    assert report.trainable == elements
    assert report.lora_bytes == 4 * elements
    assert q4jax.memory_report(merge_quantized(variables)) == report


def test_adapters_are_saved_and_restored(tmp_path):
    _, small, _, _ = both("any")
    variables = add_lora(small, 4, 8)
    trained = {**variables, "lora": randomize(variables["lora"])}
    data = serialization.to_bytes(trained)
    assert_same(serialization.from_bytes(variables, data), trained)
    assert serialization.from_bytes(variables, data)["lora"]["up"]["kernel"].alpha == 8
    q4jax.checkpoint.save(tmp_path / "c", trained)
    assert_same(q4jax.checkpoint.restore(tmp_path / "c", target=variables), trained)
