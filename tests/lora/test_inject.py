"""Adapters wherever a weight is: by regex, on experts, embeddings, dense layers, other classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import q4jax
from q4jax.lora import LoRAEmbedding4bit, LoRALinear4bit, LoRAWeight

KEY = jax.random.key(11)
HIGHEST = jax.lax.Precision.HIGHEST


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


def fill(model):
    """Adapters as training would leave them."""
    for i, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, q4jax.lora.Adapter):
            module.lora_a[...] = draw(*module.lora_a.shape, seed=2 * i) * 0.1
            module.lora_b[...] = draw(*module.lora_b.shape, seed=2 * i + 1) * 0.1
    return model


def close(found, expected, limit=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


class Heads(nnx.Module):
    """Somebody else's class, with a weight for each expert."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 64, 32)))

    def __call__(self, x):
        return jnp.einsum("bd,edf->ebf", x, self.w[...]).mean(0)


EXPERTS = q4jax.KernelAxes((3, 64, 32), in_axes=(1,), batch_axes=(0,))
q4jax.register_layer(Heads, lambda module: {"w": EXPERTS})


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.experts = nnx.Einsum("ebd,edf->ebf", (2, 64, 64), (2, 64), rngs=rngs)
        self.heads = Heads(rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.conv = nnx.Conv(64, 64, (1,), rngs=rngs)

    def __call__(self, ids):
        x = self.attention(self.embed(ids))
        x = self.experts(jnp.stack([x[0], x[1]])).sum(0)
        return self.embed.attend(self.conv(self.up(self.heads(x))))


IDS = jnp.array([[1, 2, 3], [4, 5, 15]])
LAYERS = [f"attention.{name}" for name in ("query", "key", "value", "out")]
LAYERS += ["embed", "experts", "heads", "up"]
RULES = [q4jax.QuantRule(embeddings=True, blocksize=32)]


@pytest.fixture(scope="module")
def dense():
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def small(dense):
    return q4jax.quantize_model(dense, RULES)


def adapted(model):
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, q4jax.lora.Adapter)
    }


@pytest.mark.parametrize("four_bit", [True, False])
def test_every_kind_of_layer_computes_what_its_merge_does(dense, small, four_bit):
    base = small if four_bit else dense
    model = q4jax.add_lora(base, 4, 8, targets=r".*")
    found = adapted(model)
    assert sorted(found) == sorted([*LAYERS[:-2], "heads.w", "up"])
    assert type(found["heads.w"]) is LoRAWeight
    assert type(found["embed"]) is LoRAEmbedding4bit
    assert type(found["experts"]) is type(found["attention.out"]) is LoRALinear4bit
    assert found["experts"].lora_a.shape == (2, 64, 4)
    assert found["heads.w"].lora_b.shape == (3, 4, 32)
    run = nnx.jit(lambda m: m(IDS))
    np.testing.assert_array_equal(run(model), run(base))
    fill(model)
    merged = q4jax.merge_lora(model)
    kinds = {type(merged.embed), type(merged.experts), type(merged.attention.out), type(merged.up)}
    assert kinds == {nnx.Embed, nnx.Einsum, nnx.LinearGeneral, nnx.Linear}
    assert type(merged.heads.w) is nnx.Param
    close(run(model), run(merged))
    assert np.abs(run(model) - run(base)).max() > 0.01 * np.abs(run(base)).max()


def test_the_merge_reports_the_error_of_each_layer(small):
    model = fill(q4jax.add_lora(small, 4, 8, targets=r".*"))
    merged, errors = q4jax.merge_lora(model, requantize=True)
    exact = q4jax.merge_lora(model)
    again = q4jax.dequantize_model(merged)
    weights = {
        "embed": lambda m: m.embed.embedding,
        "experts": lambda m: m.experts.kernel,
        "attention.out": lambda m: m.attention.out.kernel,
        "heads.w": lambda m: m.heads.w,
        "up": lambda m: m.up.kernel,
    }
    assert errors.keys() == weights.keys() | {f"attention.{n}" for n in ("query", "key", "value")}
    for path, weight in weights.items():
        one, other = (np.asarray(weight(m)[...], np.float64) for m in (again, exact))
        expected = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert errors[path] == pytest.approx(expected, rel=1e-4)
        assert 0.03 < expected < 0.12
    lines = str(errors).splitlines()
    assert len(lines) == 8 and lines == sorted(lines, reverse=True)
    specs = [m.experts.weight.quant_state.spec for m in (merged, small)]
    assert specs[0] == specs[1]
    _, rounding = q4jax.merge_lora(
        fill(q4jax.add_lora(Model(nnx.Rngs(0)), 4, 8, targets="up")), requantize=True
    )
    assert rounding == {"up": 0.0}


def test_only_adapters_are_trained(small):
    model = q4jax.add_lora(small, 4, 8, targets=r".*")
    adapters = nnx.LoRAParam
    before, start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(adapters), adapters))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=adapters)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(IDS) - 1) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    after, end = nnx.state(model, nnx.Not(adapters), adapters)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert q4jax.fingerprint(after) == q4jax.fingerprint(before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), end, start)
    assert len(jax.tree.leaves(moved)) == 16 and all(jax.tree.leaves(moved))


def test_which_layers_by_default_by_name_and_by_regex(small):
    def chosen(**settings):
        return sorted(adapted(q4jax.add_lora(small, 2, 4, **settings)))

    assert chosen() == sorted([*LAYERS[:4], "experts", "heads.w", "up"])
    assert chosen(targets=("query", "attention.out")) == ["attention.out", "attention.query"]
    assert chosen(targets=r"attention\.(query|value)|up") == [
        "attention.query",
        "attention.value",
        "up",
    ]
    assert chosen(targets=["embed"]) == ["embed"]


def test_targets_that_are_refused(small):
    with pytest.raises(ValueError, match=r"no layer matches 'quer'.*attention\.key.*"):
        q4jax.add_lora(small, 2, 4, targets="quer")
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        q4jax.add_lora(small, 2, 4, targets="(")
    with pytest.raises(ValueError, match=r"no layer is \['quer'\]; layers that can have an adapt"):
        q4jax.add_lora(small, 2, 4, targets=("up", "quer"))
    with pytest.raises(ValueError, match="no layer matches 'conv'"):
        q4jax.add_lora(small, 2, 4, targets="conv")
    with pytest.raises(ValueError, match="an adapter already at heads.w"):
        q4jax.add_lora(q4jax.add_lora(small, 2, 4, targets="heads"), 2, 4)
    with pytest.raises(NotImplementedError, match="dropout at heads: a Heads has an adapter of it"):
        q4jax.add_lora(small, 2, 4, dropout=0.1)


def test_stacked_layers_scan_with_every_kind_of_adapter():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
            self.heads = Heads(rngs)
            self.up = nnx.Linear(32, 64, rngs=rngs)

        def __call__(self, x):
            return x + self.up(self.heads(self.attention(x)[0]))

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs):
        return Block(rngs)

    @nnx.jit
    def run(layers, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def scan(layer, x):
            return layer(x)

        return scan(layers, x)

    model = q4jax.add_lora(q4jax.quantize_model(stack(nnx.Rngs(0))), 4, 8)
    assert model.heads.w.lora_a.shape == (2, 3, 64, 4)
    assert model.attention.out.lora_a.shape == (2, 64, 4)
    fill(model)
    x = draw(1, 5, 64)
    close(run(model, x), run(q4jax.merge_lora(model), x))

    def gradient(x):
        loss = nnx.grad(lambda m: jnp.sum(run(m, x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))
        return jax.tree.leaves(loss(model))

    found = gradient(x)
    assert len(found) == 12 and all(jnp.abs(g).max() > 0 for g in found)


def test_the_embedding_s_head_and_rows_out_of_range(small):
    model = fill(q4jax.add_lora(small, 4, 8, targets="embed"))
    table = q4jax.merge_lora(model).embed
    ids = jnp.array([0, 15, -1, 16])
    np.testing.assert_allclose(model.embed(ids), table(ids), rtol=0, atol=1e-5)
    assert jnp.isnan(model.embed(ids)[-1]).all()
    x = draw(3, 64)
    close(model.embed.attend(x), table.attend(x))


def test_dropout_on_folded_layers_is_on_in_training_only():
    small = q4jax.quantize_model(nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0)))
    model = fill(q4jax.add_lora(small, 4, 8, dropout=0.5))
    x = draw(1, 3, 64)
    assert np.abs(model(x) - model(x)).max() > 0
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    close(model(x), q4jax.merge_lora(model)(x))


def test_the_report_of_what_is_trained(small):
    model = q4jax.add_lora(small, 4, 8, targets=("up", "heads"))
    report = q4jax.trainable_report(model)
    assert report.layers == {"heads.w": 3 * 4 * (64 + 32), "up": 4 * (32 + 64)}
    assert report.trainable == sum(report.layers.values())
    everything = sum(
        leaf.size for leaf in jax.tree.leaves(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    )
    assert report.total == everything + report.trainable
    share = f"{100 * report.trainable / report.total:.4f}"
    expected = f"trainable params: 1,536 || all params: {report.total:,} || trainable%: {share}"
    assert str(report) == expected
    assert (
        q4jax.trainable_report(small).trainable == everything - 4 * 4096 - 8192 - 6144 - 2048 - 1024
    )
    with pytest.raises(TypeError, match="must be an nnx.Module, got int"):
        q4jax.trainable_report(3)
    with pytest.raises(ValueError, match="the model has no weight"):
        q4jax.trainable_report(nnx.Dropout(0.5))
