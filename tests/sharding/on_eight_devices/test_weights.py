"""Weights on meshes beyond the product: made, decoded, looked up, partitioned by name."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import q4jax
from q4jax import linen
from q4jax.ops import embedding as lookup
from tests.support.meshes import AUTO, EXPLICIT, mesh_of, normal, place, put

MESH = {"fsdp": 4, "tensor": 2}
SPECS = [P(), P("tensor", "fsdp"), P("fsdp", "tensor"), P(None, ("fsdp", "tensor")), P("fsdp")]
W = normal(0, 256, 512)
kinds = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def context(mesh, kind):
    return jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext()


def same_place(array, mesh, spec):
    return array.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), array.ndim)


@kinds
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantize_and_back(spec, nested, kind, moved):
    """Bits are those of one device, results lie as the weight does, no float weight moves."""
    mesh = mesh_of(kind, **MESH)

    @jax.jit
    def quantize(w):
        return q4jax.Params4bit.quantize(w, 64, nested, "nf4", check_finite=False)

    dequantize = jax.jit(q4jax.dequantize_4bit)
    with context(mesh, kind):
        w = put(W, mesh, *spec)
        weight = quantize(w)
        back = dequantize(weight)
        collectives = moved(quantize, w) + moved(dequantize, weight)
    jax.tree.map(np.testing.assert_array_equal, weight, quantize(W))
    np.testing.assert_array_equal(back, dequantize(quantize(W)))
    assert same_place(weight.packed, mesh, spec)
    assert same_place(weight.quant_state.absmax, mesh, spec)
    assert same_place(back, mesh, spec)
    # Double quantization has a mean over all scales: these are gathered, the weight never.
    assert all(c.size <= W.size // 64 for c in collectives)
    assert nested or not collectives


@kinds
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_of_a_table(spec, kind, moved):
    mesh = mesh_of(kind, **MESH)
    table = q4jax.Params4bit.quantize(W, 64, True, "nf4")
    ids = np.arange(-300, 300).reshape(24, 25)
    take = jax.jit(lookup.take_rows)
    with context(mesh, kind):
        args = place(table, mesh, spec), put(jnp.asarray(ids), mesh, "fsdp")
        found = take(*args)
        collectives = moved(take, *args)
    np.testing.assert_array_equal(found, take(table, jnp.asarray(ids)))
    assert not [c for c in collectives if c.is_float and c.shape[0] in (256, 128, 64, 32)]


@pytest.mark.parametrize("shape", [(3, 64, 128), (24, 40)], ids=["joint", "flat"])
def test_other_layouts(shape):
    """A joint weight is split like a matrix; a flat one is whole wherever it is used."""
    mesh = mesh_of(**MESH)
    w = normal(0, *shape)
    weight = q4jax.Params4bit.quantize(w, 64, True, "nf4")
    spec = P(None, "fsdp", "tensor") if len(shape) == 3 else P("fsdp")

    def own(array):
        return put(array, mesh, *(spec if array.ndim == len(shape) or len(shape) == 2 else ()))

    sharded = jax.tree.map(lambda a: own(a) if a.size % 8 == 0 and a.ndim else a, weight)
    found = jax.jit(q4jax.dequantize_4bit)(sharded.packed, sharded.quant_state)
    np.testing.assert_array_equal(found, q4jax.dequantize_4bit(weight))
    if len(shape) == 2:
        x = normal(1, 8, 40)
        y = jax.jit(q4jax.matmul_4bit)(put(x, mesh, "fsdp"), sharded)
        np.testing.assert_allclose(y, q4jax.matmul_4bit(x, weight), rtol=1e-5, atol=1e-5)


RULES = (("embed", "fsdp"), ("mlp", "tensor"), ("layers", None))
INIT = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))


class Model(nnx.Module):
    """Layers made every way, with logical names."""

    def __init__(self, rngs: nnx.Rngs):
        up = {"out_sharding": ("embed", "mlp")}
        self.table = q4jax.EmbeddingNF4(
            64, 256, embedding_metadata={"out_sharding": ("mlp", "embed")}, rngs=rngs
        )
        self.up = q4jax.LinearNF4(
            256, 512, kernel_metadata=up, bias_metadata={"out_sharding": ("mlp",)}, rngs=rngs
        )
        self.down = q4jax.Linear4bit.from_linear(
            nnx.Linear(512, 256, kernel_metadata={"out_sharding": ("mlp", "embed")}, rngs=rngs)
        )

        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> q4jax.Linear4bit:
            return q4jax.LinearFP4(256, 256, kernel_init=INIT, rngs=rngs)

        self.stack = stack(rngs)

    def __call__(self, ids):
        @nnx.scan(
            in_axes=(0, nnx.Carry),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        def run(layer, x):
            return layer(x)

        return run(self.stack, self.down(self.up(self.table(ids))))


EXPECTED = {
    "table.weight": (P("tensor", "fsdp"), P(None)),
    "up.weight": (P("tensor", "fsdp"), P(None)),
    "down.weight": (P("fsdp", "tensor"), P(None)),
    "stack.weight": (P(None, "tensor", "fsdp"), P(None, None)),
}


def check(state, spec_of=lambda array: array.sharding.spec):
    """Every leaf lies where its names say."""
    for path, variable in nnx.to_flat_state(state):
        spec = spec_of(variable.get_value())
        name = ".".join(map(str, path[:2]))
        leaf = str(path[-1]).split("__")[0]
        if name in EXPECTED:
            split, whole = EXPECTED[name]
            wanted = {"nested_absmax": whole, "offset": P()}.get(leaf, split)
        else:
            wanted = P("tensor") if name == "up.bias" else P()
        # One that ends in None is the same as one without.
        found, wanted = (tuple(s) + (None,) * (3 - len(s)) for s in (spec, wanted))
        assert found == wanted, (path, found, wanted)


def test_partition_names_of_nnx_layers(tmp_path):
    """Abstract, then made on the mesh or restored onto it: no device holds all of a weight."""
    mesh = mesh_of(**MESH)
    ids = jnp.arange(16).reshape(8, 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        graph, abstract = nnx.get_abstract_model(lambda: Model(nnx.Rngs(0)), mesh)
        check(abstract)
        made = nnx.jit(lambda: Model(nnx.Rngs(0)))()
        specs = nnx.get_partition_spec(nnx.state(made))
        check(specs, lambda spec: spec)
        check(nnx.state(made))
        forward = nnx.jit(lambda model, ids: model(ids))
        found = forward(made, ids)
        q4jax.checkpoint.save(tmp_path / "model", made)
        target = nnx.merge(graph, abstract)
        restored = q4jax.checkpoint.restore(tmp_path / "model", target)
    check(nnx.state(restored))
    np.testing.assert_array_equal(forward(restored, ids), found)
    assert q4jax.fingerprint(restored) == q4jax.fingerprint(made)


def test_partition_names_that_do_not_fit():
    mesh = mesh_of(**MESH)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        with pytest.raises(ValueError, match=r"over 'mlp', 'embed': its rows of 40 are not whole"):
            q4jax.LinearNF4(40, 64, kernel_init=INIT, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="has 2 axes, its partition names are"):
            q4jax.LinearNF4(
                64, 64, kernel_metadata={"out_sharding": ("a", "b", "c")}, rngs=nnx.Rngs(0)
            )
        layer = linen.Linear4bit(
            64, kernel_init=nn.with_partitioning(nn.linear.default_kernel_init, ("embed", "mlp"))
        )
        with pytest.raises(ValueError, match=r"kernel: .* its rows of 40 are not whole blocks"):
            layer.init(jax.random.key(0), jnp.ones((1, 40)))


def test_linen():
    """Logical names to a mesh, sharded initialization, and a forward pass on it."""
    mesh = mesh_of(**MESH)
    init = nn.with_logical_partitioning(nn.linear.default_kernel_init, ("embed", "mlp"))
    layer = linen.Linear4bit(512, quant_type="nf4", kernel_init=init)
    x = normal(1, 8, 256)
    abstract = jax.eval_shape(layer.init, jax.random.key(0), x)
    specs = nn.get_partition_spec(abstract)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x)
    weight = nn.unbox(variables)["quant"]["weight"]
    assert same_place(weight.packed, mesh, P("tensor", "fsdp"))
    assert same_place(weight.quant_state.absmax, mesh, P("tensor", "fsdp"))
    assert same_place(weight.quant_state.nested_absmax, mesh, P())
    y = jax.jit(layer.apply)(variables, put(x, mesh, "fsdp"))
    plain = layer.init(jax.random.key(0), x)
    np.testing.assert_allclose(y, layer.apply(plain, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("packed", "absmax", "text"),
    [
        (
            P(None, "x"),
            P(),
            r"packed \[256, 256\] is split over the mesh axes x of size 8, which "
            "does not divide its 4 blocks a row",
        ),
        (
            P("x"),
            P(),
            r"packed \[256, 256\] is split as P\('x', None\) and absmax \[256, 4\] as "
            r"P\(None, None\): they must be split alike",
        ),
        (P(), P("x"), "they must be split alike"),
    ],
    ids=["blocks", "codes", "scales"],
)
@kinds
def test_a_weight_that_is_split_wrongly(packed, absmax, text, kind):
    mesh = mesh_of(kind, x=8)
    weight = q4jax.Params4bit.quantize(W, 128, False, "nf4")
    state = weight.quant_state
    state = q4jax.QuantState(put(state.absmax, mesh, *absmax), None, None, state.spec)
    wrong = q4jax.Params4bit(put(weight.packed, mesh, *packed), state)
    with pytest.raises(ValueError, match=r"layers\.3\.weight \(nf4_b128_n0_\S+\): .*" + text):
        q4jax.check_sharding({"layers": [None] * 3 + [{"weight": wrong}]})
    for function in (lambda w: q4jax.matmul_4bit(jnp.ones((8, 512)), w), q4jax.dequantize_4bit):
        error = ValueError if kind == EXPLICIT else jax.errors.JaxRuntimeError
        with context(mesh, kind), pytest.raises(error, match=text) as caught:
            jax.jit(function)(wrong)
        assert "nf4_b128_n0_float32_256x512" in str(caught.value)


LAYERS = {
    "linear": lambda rngs: nnx.Linear(64, 128, rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral(64, (8, 16), rngs=rngs),
    "einsum": lambda rngs: nnx.Einsum("bd,df->bf", (64, 128), (128,), rngs=rngs),
    "embed": lambda rngs: nnx.Embed(8, 64, rngs=rngs),
    "attend": lambda rngs: nnx.Embed(128, 64, rngs=rngs),
}


@pytest.mark.parametrize("asked", [P("fsdp"), P(None, "tensor"), P("fsdp", "tensor")], ids=str)
@pytest.mark.parametrize("adapters", [False, True], ids=["alone", "adapter"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_place_their_result_as_out_sharding_asks(name, adapters, asked):
    """As Flax's layers do on explicit axes, in and out of jit, under another sharding of x."""
    mesh = mesh_of(EXPLICIT, **MESH)
    dense = LAYERS[name](nnx.Rngs(0))
    layer = q4jax.quantize_model(dense, [q4jax.QuantRule(embeddings=True)])
    if adapters:
        layer = q4jax.add_lora(layer, rank=4, alpha=8, targets="")
    x = jnp.arange(8) if name == "embed" else normal(1, 8, 64)

    def call(model, x, out_sharding):
        function = model.attend if name == "attend" else model
        return function(x, out_sharding=out_sharding)

    whole = call(layer, x, None)
    with jax.set_mesh(mesh):
        x = put(x, mesh, "fsdp")
        like = call(dense, x, asked)
        for function in (call, nnx.jit(call, static_argnums=2)):
            y = function(layer, x, asked)
            assert y.sharding.is_equivalent_to(like.sharding, y.ndim)
            np.testing.assert_allclose(y, whole, rtol=0, atol=2e-6 * float(abs(whole).max()))


@kinds
@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "tensor"), P("fsdp", "tensor")], ids=str)
def test_adapters_take_rows_of_several_axes(kind, spec):
    """Those of one device, wherever the rows or the sequence are split."""
    layer = q4jax.add_lora(q4jax.LinearNF4(64, 128, rngs=nnx.Rngs(0)), rank=4, alpha=8, targets="")
    layer.lora_b[...] = normal(2, 4, 128)
    x, mesh = normal(1, 4, 8, 64), mesh_of(kind, **MESH)
    gradient = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum(), argnums=1))
    whole, expected = layer(x), gradient(layer, x)
    with jax.set_mesh(mesh):
        split = put(x, mesh, *spec)
        np.testing.assert_allclose(
            nnx.jit(lambda layer, x: layer(x))(layer, split), whole, 1e-5, 1e-5
        )
        np.testing.assert_allclose(gradient(layer, split), expected, rtol=1e-4, atol=1e-4)


def test_out_sharding_on_automatic_axes_is_refused():
    layer = q4jax.LinearNF4(64, 128, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh_of(AUTO, **MESH)), pytest.raises(ValueError, match="Auto"):
        layer(normal(1, 8, 64), out_sharding=P("fsdp"))
