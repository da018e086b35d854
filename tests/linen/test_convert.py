"""Linen models of other people on 4-bit weights: their own forward, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.core import meta

import q4jax
from q4jax import QuantRule, checkpoint
from q4jax.linen import merge_quantized, plan_quantization, quantize_model
from q4jax.linen.quantized_param import QuantizedBox
from q4jax.linen.unmerged import Unmerged

KEY = jax.random.key(3)


class Einsum(nn.Module):
    """The equation comes with the call, and the name of the weight is a field."""

    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(
            equation, x, self.param(self.weight_name, nn.initializers.normal(), self.shape)
        )


class Embedder(nn.Module):
    """Its table is read in `setup` and used twice, by methods that are not `__call__`."""

    rows: int
    width: int

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(), (self.rows, self.width))

    def encode(self, ids):
        return self.table[ids]

    def decode(self, x):
        return x @ self.table.T


class FeedForward(nn.Module):
    """Its layers put their weights into its own scope."""

    @nn.compact
    def __call__(self, x):
        gate = Einsum((2, 64, 96), "gating")
        nn.share_scope(self, gate)
        a, b = gate("...D,CDF->C...F", x)
        down = Einsum((96, 64), "linear")
        nn.share_scope(self, down)
        return down("...F,FD->...D", nn.gelu(a) * b)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.RMSNorm()(x)
        q = Einsum((4, 64, 16), name="q")("BTD,NDH->BTNH", h)
        x = x + Einsum((4, 16, 64), name="out")("BTNH,NHD->BTD", q)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(h)
        return x + FeedForward(name="ffw")(h), None


class Model(nn.Module):
    scanned: bool = False

    def setup(self):
        self.embedder = Embedder(32, 64)
        if self.scanned:
            stack = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            self.blocks = stack()
        else:
            self.blocks = Block()
        self.dense = nn.Dense(64)
        self.einsum = nn.Einsum((64, 64), "btd,de->bte")

    def __call__(self, ids):
        x, _ = self.blocks(self.embedder.encode(ids), None)
        return self.embedder.decode(self.einsum(self.dense(x)))


q4jax.register_layer(Einsum, lambda module, equation, x: {module.weight_name: equation})
q4jax.register_layer(
    Embedder, lambda module: {"table": q4jax.KernelAxes((module.rows, module.width), in_axes=(1,))}
)
IDS = jnp.array([[1, 2, 31], [4, 5, 6]])
BLOCK = ["blocks/attention/" + name for name in ("key", "out", "query", "value")]
BLOCK += ["blocks/ffw", "blocks/out", "blocks/q"]
LAYERS = sorted([*BLOCK, "dense", "einsum", "embedder"])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "scanned"])
def case(request):
    model = Model(request.param)
    variables = model.init(KEY, IDS)
    return model, variables, quantize_model(model, variables, IDS)


def test_every_layer_is_found(case):
    model, variables, small = case
    plan = plan_quantization(model, variables, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype))
    assert [d.path for d in plan.quantized] == LAYERS
    assert plan.kept == []
    boxes = jax.tree.leaves(small["quant"], is_leaf=lambda x: isinstance(x, QuantizedBox))
    assert len(boxes) == len(LAYERS) + 1 and {type(box) for box in boxes} == {QuantizedBox}
    kept = jax.tree.leaves(small["params"])
    stack = int(model.scanned)
    assert max(leaf.ndim for leaf in kept) == 2 + stack  # the biases of heads
    gate = small["quant"]["blocks"]["ffw"]["gating"].weight.quant_state
    assert gate.shape == (*[2] * stack, 192, 64)


def test_the_forward_is_the_owner_s_own_to_the_bit(case):
    model, variables, small = case
    placed = merge_quantized(small)
    dense = nn.unbox(placed)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, variables)
    found = jax.jit(lambda v: model.apply(merge_quantized(v), IDS))(small)
    np.testing.assert_array_equal(found, jax.jit(model.apply)(dense, IDS))
    np.testing.assert_array_equal(model.apply(placed, IDS), model.apply(dense, IDS))
    assert not np.array_equal(found, model.apply(variables, IDS))


def test_gradients_are_those_of_the_rest(case):
    model, _, small = case

    @jax.jit
    def gradient(params, quant):
        def loss(params):
            placed = merge_quantized({"params": params, "quant": quant})
            return jnp.sum(model.apply(placed, IDS) ** 2)

        return jax.grad(loss)(params)

    found = gradient(small["params"], small["quant"])
    assert jax.tree.structure(found) == jax.tree.structure(small["params"])

    def loss(params):
        return jnp.sum(model.apply({"params": params}, IDS) ** 2)

    expected = jax.jit(jax.grad(loss))(nn.unbox(merge_quantized(small))["params"])
    # XLA orders sums by processor.
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max()
        ),
        found,
        _subset(expected, found),
    )


def _subset(tree, like):
    if not isinstance(like, dict):
        return like if isinstance(like, Unmerged) else tree
    return {name: _subset(tree[name], child) for name, child in like.items()}


def test_checkpoints(case, tmp_path):
    model, variables, small = case
    q4jax.checkpoint.save(tmp_path / "c", small)
    other = quantize_model(model, jax.tree.map(lambda w: w + 1, variables), IDS)
    found = q4jax.checkpoint.restore(tmp_path / "c", target=other)
    assert q4jax.fingerprint(found) == q4jax.fingerprint(small) != q4jax.fingerprint(other)
    np.testing.assert_array_equal(
        model.apply(merge_quantized(found), IDS), model.apply(merge_quantized(small), IDS)
    )


def test_flax_serialization(case):
    model, variables, small = case
    other = quantize_model(model, jax.tree.map(lambda w: w + 1, variables), IDS)
    found = serialization.from_bytes(other, serialization.to_bytes(small))
    assert q4jax.fingerprint(found) == q4jax.fingerprint(small)
    assert jax.tree.structure(found) == jax.tree.structure(small)
    fp4 = quantize_model(model, variables, IDS, config=q4jax.QuantConfig("fp4"))
    with pytest.raises(ValueError, match="the target is fp4_.* the state dict holds nf4_"):
        serialization.from_bytes(fp4, serialization.to_bytes(small))


def test_rules_and_embeddings():
    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(32, 64)
            self.up = nn.Dense(64)
            self.conv = nn.Conv(64, (3,))

        def __call__(self, ids):
            return self.embed.attend(self.up(self.conv(self.embed(ids))))

    model = Tied()
    variables = model.init(KEY, IDS)
    plan = plan_quantization(model, variables, IDS)
    assert {d.path: d.reason for d in plan.kept} == {
        "conv": "a convolution",
        "embed": "an embedding; QuantRule(embeddings=True) takes it",
    }
    rules = [QuantRule("up", blocksize=32, quant_type="fp4"), QuantRule(embeddings=True)]
    small = quantize_model(model, variables, IDS, config=rules)
    tags = jax.tree.map(
        lambda box: box.weight.quant_state.spec.tag(),
        small["quant"],
        is_leaf=lambda x: isinstance(x, QuantizedBox),
    )
    assert tags == {
        "up": {"kernel": "fp4_b32_n256_float32_64x64"},
        "embed": {"embedding": "nf4_b64_n256_float32_32x64"},
    }
    placed = merge_quantized(small)
    np.testing.assert_array_equal(model.apply(placed, IDS), model.apply(nn.unbox(placed), IDS))
    for rule, message in [
        (QuantRule("conv"), "rule 'conv' matches conv .Conv., which cannot be quantized: a conv"),
        (QuantRule("down"), "no layer matches 'down'.* the layers are: conv, embed, up"),
        (QuantRule("embed"), r"matched no layer .*embed \(Embed\): kept: an embedding"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_model(model, variables, IDS, config=[rule])


def test_what_cannot_be_placed_or_found():
    class Unknown(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.normal(), (64, 64))

    x = jnp.ones((1, 64))
    with pytest.raises(ValueError, match=r"\(root\) \(Unknown\): kept: .*register_layer.*\['w'\]"):
        quantize_model(Unknown(), Unknown().init(KEY, x), x)
    with pytest.raises(ValueError, match=r"must hold a dict 'params', got the keys \[\]"):
        quantize_model(nn.Dense(64), {}, x)
    with pytest.raises(ValueError, match=r"must hold a dict 'params', got .*int"):
        quantize_model(nn.Dense(64), 3, x)
    linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="model must be a flax.linen.Module, got Linear"):
        quantize_model(linear, {}, x)
    variables = nn.Dense(64).init(KEY, x)
    small = quantize_model(nn.Dense(64), variables, x)
    with pytest.raises(ValueError, match="kernel is in 'params' and, 4-bit, in 'quant'"):
        merge_quantized({**small, "params": variables["params"]})
    with pytest.raises(TypeError, match=r"no argument 'quant_type'.*QuantConfig\(quant_type="):
        quantize_model(nn.Dense(64), variables, x, quant_type="fp4")
    bad = meta.unbox(variables)
    bad["params"]["kernel"] = bad["params"]["kernel"].at[3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match="kernel holds NaN or inf"):
        quantize_model(nn.Dense(64), bad, x)


def test_an_argument_of_the_model_may_have_the_name_of_a_setting():
    class Cast(nn.Module):
        @nn.compact
        def __call__(self, x, dtype, **more):
            return nn.Dense(64)(x).astype(dtype)

    x = jnp.ones((1, 64))
    arguments = {"dtype": jnp.bfloat16, "skip": ()}
    variables = Cast().init(KEY, x, **arguments)
    small = quantize_model(Cast(), variables, x, **arguments)
    assert Cast().apply(merge_quantized(small), x, **arguments).dtype == jnp.bfloat16


def test_variables_restored_without_a_target_are_refused(tmp_path):
    """They have no axes of their kernels; Flax alone would find no kernel."""
    model, x = nn.Dense(64), jnp.ones((1, 64))
    small = quantize_model(model, model.init(KEY, x), x)
    checkpoint.save(tmp_path / "c", small)
    with pytest.raises(ValueError, match="kernel in 'quant' must be .* got a bare Params4bit"):
        merge_quantized(checkpoint.restore(tmp_path / "c"))
    found = merge_quantized(checkpoint.restore(tmp_path / "c", small))
    np.testing.assert_array_equal(model.apply(found, x), model.apply(merge_quantized(small), x))
    # The layers of q4jax.linen read such weights themselves.
    layer = q4jax.linen.LinearNF4(64)
    variables = layer.init(KEY, x)
    checkpoint.save(tmp_path / "d", variables)
    found = merge_quantized(checkpoint.restore(tmp_path / "d"))
    np.testing.assert_array_equal(layer.apply(found, x), layer.apply(variables, x))


def test_a_skip_list_names_modules_of_the_model():
    model = nn.Sequential([nn.Dense(64), nn.Dense(64)])
    x = jnp.ones((1, 64))
    variables = model.init(KEY, x)
    small = quantize_model(model, variables, x, config=q4jax.QuantConfig(skip=("layers_1",)))
    assert list(small["quant"]) == ["layers_0"]
    with pytest.raises(ValueError, match="skip has 'layer_1', which no module matches.*layers_0"):
        quantize_model(model, variables, x, config=q4jax.QuantConfig(skip=("layer_1",)))
