"""The Linen embeddings, and the variables of dense models made 4-bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import q4jax
from q4jax import linen

KEY = jax.random.key(0)
IDS = jnp.array([[3, 0], [-1, 9]])


@pytest.mark.parametrize(("features", "nested"), [(64, True), (64, False), (40, True)])
def test_embedding_rows_are_those_of_the_table(features, nested):
    layer = linen.EmbeddingNF4(10, features, compress_statistics=nested)
    variables = layer.init(KEY, IDS)
    table = nn.Embed(10, features).init(KEY, IDS)["params"]["embedding"]
    expected = q4jax.Params4bit.quantize(table, quant_type="nf4", compress_statistics=nested)
    stored = variables["quant"]["embedding"]
    np.testing.assert_array_equal(stored.packed, expected.packed)
    assert list(variables) == ["quant"]
    dense = stored.dequantize()
    np.testing.assert_array_equal(layer.apply(variables, IDS), dense[IDS])
    query = jax.random.normal(KEY, (2, 3, features))
    logits = layer.apply(variables, query, method="attend")
    np.testing.assert_array_equal(logits, q4jax.matmul_4bit(query, stored))


def test_embedding_dtypes():
    layer = linen.EmbeddingFP4(10, 64, dtype=jnp.bfloat16)
    variables = layer.init(KEY, IDS)
    assert layer.apply(variables, IDS).dtype == jnp.bfloat16
    assert layer.apply(variables, jnp.ones((1, 64)), method="attend").dtype == jnp.bfloat16
    layer = linen.EmbeddingFP4(10, 64, param_dtype=jnp.float16)
    variables = layer.init(KEY, IDS)
    assert layer.apply(variables, IDS).dtype == jnp.float16
    query = jnp.ones((1, 64), jnp.bfloat16)
    assert layer.apply(variables, query, method="attend").dtype == jnp.bfloat16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_table_of_signs_is_lossless(quant_type):
    table = jax.random.rademacher(KEY, (10, 64), jnp.float32)
    layer = linen.Embedding4bit(10, 64, quant_type=quant_type, embedding_init=lambda *_: table)
    variables = layer.init(KEY, IDS)
    np.testing.assert_array_equal(layer.apply(variables, IDS), table[IDS])


def test_embedding_refuses():
    layer = linen.EmbeddingNF4(10, 64)
    variables = layer.init(KEY, IDS)
    with pytest.raises(ValueError, match="integers, got float32"):
        layer.apply(variables, IDS.astype(jnp.float32))
    held = "EmbeddingFP4 is fp4_b64_n256_float32_10x64, its variables hold nf4_b64_n256_"
    with pytest.raises(ValueError, match=held):
        linen.EmbeddingFP4(10, 64).apply(variables, IDS)
    with pytest.raises(ValueError, match=r"_11x64, its variables hold .*_10x64"):
        linen.EmbeddingNF4(11, 64).apply(variables, IDS)
    nan = linen.EmbeddingNF4(10, 64, embedding_init=nn.initializers.constant(jnp.inf))
    with pytest.raises(ValueError, match=r"embedding.*NaN or inf"):
        nan.init(KEY, IDS)


class Model(nn.Module):
    """Every kind of node; dense or 4-bit by the classes it is given."""

    linear: type = nn.Dense
    embed: type = nn.Embed

    @nn.compact
    def __call__(self, ids):
        embed = self.embed(16, 64, name="embed")
        x = nn.LayerNorm(name="norm")(embed(ids))
        x = self.linear(64, use_bias=False, name="up")(x)
        scan = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"params": 0, "quant": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = scan(self.linear(64, name="blocks"), x, None)
        x = nn.Conv(64, (3,), name="conv")(x)
        return nn.Dense(16, name="lm_head")(x) + embed.attend(x)


def test_quantize_variables():
    ids = jnp.array([[1, 2, 3]])
    dense = jax.jit(Model().init)(KEY, ids)
    frozen = {**dense, "batch_stats": {"mean": jnp.ones(3)}}
    got = linen.quantize_variables(
        frozen, skip=["lm_head"], embeddings=True, quant_type="nf4", blocksize=32
    )
    assert got.pop("batch_stats") is frozen["batch_stats"]

    def linear(features, **fields):
        return linen.LinearNF4(features, blocksize=32, **fields)

    def embed(rows, features, **fields):
        return linen.EmbeddingNF4(rows, features, blocksize=32, **fields)

    twin = Model(linear, embed)
    assert jax.tree.structure(got) == jax.tree.structure(jax.eval_shape(twin.init, KEY, ids))
    assert got["params"]["lm_head"]["kernel"] is dense["params"]["lm_head"]["kernel"]
    stacked = got["quant"]["blocks"]["weight"]
    for i in range(2):
        kernel = dense["params"]["blocks"]["kernel"][i]
        expected = q4jax.Params4bit.quantize(kernel.T, 32, True, "nf4")
        np.testing.assert_array_equal(stacked.packed[i], expected.packed)
    # The 4-bit model is the dense one with the decoded weights in place.
    decoded = jax.tree.map(lambda leaf: leaf, dense)["params"]
    decoded["embed"]["embedding"] = got["quant"]["embed"]["embedding"].dequantize()
    decoded["up"]["kernel"] = got["quant"]["up"]["weight"].dequantize().T
    decoded["blocks"]["kernel"] = stacked.dequantize().mT
    expected = jax.jit(Model().apply)({"params": decoded}, ids)
    np.testing.assert_allclose(jax.jit(twin.apply)(got, ids), expected, rtol=1e-4, atol=1e-5)


def test_quantize_variables_of_one_layer():
    x = jnp.ones((2, 64), jnp.bfloat16)
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    dense = nn.Dense(8, param_dtype=jnp.bfloat16, kernel_init=init)
    variables = linen.quantize_variables(dense.init(KEY, x), compress_statistics=False)
    layer = linen.Linear4bit(
        8, param_dtype=jnp.bfloat16, kernel_init=init, compress_statistics=False
    )
    assert jax.tree.structure(variables) == jax.tree.structure(layer.init(KEY, x))
    assert layer.apply(variables, x).shape == (2, 8)


def test_skip_and_what_is_left():
    kernel = {"kernel": jnp.ones((64, 8))}
    variables = {"params": {"a": {"head": kernel, "up": kernel}, "head2": kernel}}
    mlp = {"params": {"mlp": {"up": kernel, "down": kernel}}}
    # The end of a parent's path keeps nothing below it.
    assert list(linen.quantize_variables(mlp, skip=["p"])["quant"]["mlp"]) == ["down"]
    for skip, left in [
        (["head"], ["a/up", "head2"]),
        (["a"], ["head2"]),
        (["a/up"], ["a/head", "head2"]),
        (["up", "head2"], ["a/head"]),
    ]:
        quant = linen.quantize_variables(variables, skip=skip)["quant"]
        found = ["/".join(k.key for k in path[:-1]) for path, _ in _weights(quant)]
        assert found == left


def _weights(quant):
    is_leaf = lambda node: isinstance(node, q4jax.Params4bit)  # noqa: E731
    return jax.tree_util.tree_leaves_with_path(quant, is_leaf=is_leaf)


def test_quantize_variables_refuses():
    kernel = jnp.ones((64, 8))
    variables = {"params": {"up": {"kernel": kernel}, "norm": {"scale": jnp.ones(8)}}}
    done = linen.quantize_variables(variables)
    with pytest.raises(ValueError, match=r"no layer to quantize with skip=\[\].*\['norm/scale'\]"):
        linen.quantize_variables(done)
    with pytest.raises(ValueError, match=r"no layer .* skip=\['up'\]"):
        linen.quantize_variables(variables, skip=["up"])
    with pytest.raises(ValueError, match="skip must be a tuple of names, got 'up'"):
        linen.quantize_variables(variables, skip="up")
    with pytest.raises(ValueError, match="skip has 'down', which no module matches"):
        linen.quantize_variables(variables, skip=["up", "down"])
    with pytest.raises(ValueError, match=r"'params', got the keys \['up', 'norm'\]"):
        linen.quantize_variables(variables["params"])
    with pytest.raises(ValueError, match=r"quant_type must be .* got 'int4'"):
        linen.quantize_variables(variables, quant_type="int4")
    for shape in [(64, 8), (2, 64, 8)]:
        bad = {"params": {"up": {"kernel": jnp.ones(shape).at[..., 3, 1].set(jnp.nan)}}}
        with pytest.raises(ValueError, match=r"params/up/kernel.*NaN or inf"):
            linen.quantize_variables(bad)
    for dtype in ("int32", "float64"):
        bad = {"params": {"up": {"kernel": np.ones((64, 8), dtype)}}}
        with pytest.raises(ValueError, match=rf"params/up/kernel must be float32.* got {dtype}"):
            linen.quantize_variables(bad)
