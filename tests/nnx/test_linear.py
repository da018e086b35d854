"""The NNX layers: their values, what they show to training, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import q4jax
from q4jax.nnx.linear import unsupported_reason
from q4jax.nnx.variables import Frozen4bit, from_variables, to_variables

X = jax.random.normal(jax.random.key(7), (3, 128))
LINEARS = [q4jax.Linear4bit, q4jax.LinearNF4, q4jax.LinearFP4]
EMBEDDINGS = [q4jax.Embedding4bit, q4jax.EmbeddingNF4, q4jax.EmbeddingFP4]


def linear(cls=q4jax.LinearNF4, **settings):
    return cls(128, 96, rngs=nnx.Rngs(0), **settings)


def bits(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def stack(n=3, features=64, **settings):
    @nnx.split_rngs(splits=n)
    @nnx.vmap
    def make(rngs):
        return q4jax.LinearNF4(features, features, rngs=rngs, **settings)

    return make(nnx.Rngs(0))


@pytest.mark.parametrize(
    ("cls", "quant_type"), list(zip(LINEARS, ["fp4", "nf4", "fp4"], strict=True))
)
def test_defaults_are_those_of_bitsandbytes(cls, quant_type):
    state = linear(cls).weight.quant_state
    assert state.spec.tag() == f"{quant_type}_b64_n256_float32_96x128"


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_weight_is_the_quantized_kernel_of_nnx_linear(use_bias, compress_statistics):
    dense = nnx.Linear(128, 96, use_bias=use_bias, rngs=nnx.Rngs(0))
    settings = {"quant_type": "nf4", "compress_statistics": compress_statistics}
    expected = q4jax.Params4bit.quantize(dense.kernel[...].T, **settings)
    made = linear(q4jax.Linear4bit, use_bias=use_bias, **settings)
    taken = q4jax.Linear4bit.from_linear(dense, **settings)
    assert bits(from_variables(made.weight)) == bits(from_variables(taken.weight)) == bits(expected)
    y = X @ expected.dequantize().T
    np.testing.assert_allclose(made(X), y, rtol=0, atol=1e-5)
    assert (made.bias is None) == (taken.bias is None) == (not use_bias)


def test_from_linear_shares_the_bias_and_keeps_the_dtype():
    dense = nnx.Linear(64, 32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = q4jax.LinearFP4.from_linear(dense)
    assert layer.bias is dense.bias
    assert layer.dtype == jnp.bfloat16
    assert layer(jnp.ones((1, 64))).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_compute_dtype_is_the_inputs_unless_given(dtype):
    assert linear()(X.astype(dtype)).dtype == dtype
    assert linear(dtype=dtype)(X).dtype == dtype


@pytest.mark.parametrize("blocksize", [32, 256])
def test_ragged_and_other_blocksizes(blocksize):
    dense = nnx.Linear(72, 40, rngs=nnx.Rngs(0))
    layer = q4jax.LinearNF4.from_linear(dense, blocksize=blocksize)
    w = from_variables(layer.weight).dequantize()
    x = X[:, :72]
    np.testing.assert_allclose(layer(x), x @ w.T, rtol=0, atol=1e-5)


def test_only_the_bias_is_a_param():
    layer = linear()
    kinds = {type(leaf) for _, leaf in nnx.to_flat_state(nnx.state(layer))}
    assert kinds == {nnx.Param, Frozen4bit}
    assert [p for p, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))] == [("bias",)]
    grads = nnx.grad(lambda m: m(X).sum())(layer)
    assert [p for p, _ in nnx.to_flat_state(grads)] == [("bias",)]


def test_training_with_weight_decay_leaves_every_byte():
    layer = linear()
    before, bias = bits(from_variables(layer.weight)), np.asarray(layer.bias[...])
    optimizer = nnx.Optimizer(layer, optax.adamw(0.1, weight_decay=0.5), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda m: (m(X) ** 2).sum())(layer))

    for _ in range(3):
        step(layer, optimizer)
    assert bits(from_variables(layer.weight)) == before
    assert not np.array_equal(layer.bias[...], bias)
    moments = [leaf.dtype for leaf in jax.tree.leaves(nnx.state(optimizer))]
    assert jnp.uint8 not in moments


@pytest.mark.parametrize(
    "carry",
    [
        nnx.clone,
        lambda m: nnx.merge(*nnx.split(m)),
        lambda m: jax.tree.map(lambda a: a, m),
        lambda m: nnx.jit(lambda m: m)(m),
        lambda m: nnx.merge(nnx.graphdef(m), jax.device_put(nnx.state(m), jax.devices()[0])),
        lambda m: nnx.merge(nnx.graphdef(m), jax.tree.map(jnp.copy, nnx.state(m))),
    ],
    ids=["clone", "split_merge", "tree_map", "jit", "device_put", "copied"],
)
def test_the_state_is_carried(carry):
    layer = linear()
    carried = carry(layer)
    assert bits(from_variables(carried.weight)) == bits(from_variables(layer.weight))
    assert np.array_equal(carried(X), layer(X))


def test_stacked_layers_scan_as_their_slices():
    layers = stack()
    x = X[:, :64]

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def run(layer, x):
        return jnp.tanh(layer(x))

    expected = x
    for i in range(3):
        layer = jax.tree.map(lambda a: a[i], nnx.state(layers))  # noqa: B023
        expected = jnp.tanh(nnx.merge(nnx.graphdef(layers), layer)(expected))
    np.testing.assert_allclose(run(layers, x), expected, rtol=0, atol=1e-6)
    grads = nnx.grad(lambda m: run(m, x).sum())(layers)
    assert grads["bias"][...].shape == (3, 64)


def test_abstract_creation_allocates_nothing_and_is_filled():
    abstract = nnx.eval_shape(linear)
    assert isinstance(abstract.weight.packed.get_value(), jax.ShapeDtypeStruct)
    concrete = linear()
    filled = nnx.merge(nnx.graphdef(abstract), nnx.state(concrete))
    assert np.array_equal(filled(X), concrete(X))


OTHERS = {
    "quant_type": {"cls": q4jax.LinearFP4},
    "blocksize": {"blocksize": 32},
    "nesting": {"compress_statistics": False},
    "dtype": {"param_dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("other", list(OTHERS.values()), ids=list(OTHERS))
def test_a_state_of_another_description_cannot_be_used(other):
    """Flax's merge compares nothing, its update and replace compare structure."""
    mine, theirs = linear(), linear(**other)
    tags = [layer.weight.quant_state.spec.tag() for layer in (mine, theirs)]
    with pytest.raises(ValueError, match=r"absmax__|leaves|Expected|" + tags[0]) as merged:
        nnx.merge(nnx.graphdef(mine), nnx.state(theirs))(X)
    if "expects" in str(merged.value):
        assert tags[1] in str(merged.value)
    with pytest.raises(ValueError, match="absmax__"):
        nnx.update(mine, nnx.state(theirs))
    target = nnx.state(linear())
    with pytest.raises((ValueError, KeyError), match="absmax__"):
        nnx.replace_by_pure_dict(target, nnx.to_pure_dict(nnx.state(theirs)))


def test_a_module_that_flax_left_half_updated_is_refused_at_use():
    mine, theirs = linear(), linear(cls=q4jax.LinearFP4)
    with pytest.raises(ValueError, match="absmax__"):
        nnx.update(mine, nnx.state(theirs))
    with pytest.raises(ValueError, match=r"expects a weight nf4.*holds fp4"):
        mine(X)


def test_a_merged_state_of_another_shape_is_refused():
    mine, theirs = linear(), q4jax.LinearNF4(96, 128, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expects a weight nf4.*96x128, its state holds .*128x96"):
        nnx.merge(nnx.graphdef(mine), nnx.state(theirs))(X)


@pytest.mark.parametrize("leaf", ["packed", "absmax", "nested_absmax", "offset"])
def test_a_cast_of_any_leaf_is_refused(leaf):
    layer = linear()
    state = nnx.state(layer)

    def cast(path, a):
        names = [str(getattr(p, "key", p)).split("__")[0] for p in path]
        return a.astype(jnp.bfloat16) if leaf in names else a

    cast_state = jax.tree_util.tree_map_with_path(cast, state)
    with pytest.raises(ValueError, match=rf"{leaf} must be .*got bfloat16"):
        nnx.merge(nnx.graphdef(layer), cast_state)(X)


def test_a_leaf_that_is_no_frozen_variable_is_refused():
    layer = linear()
    weight = from_variables(layer.weight)
    layer.weight = jax.tree.map(nnx.Param, weight)
    with pytest.raises(TypeError, match=r"must be a Frozen4bit, got Param"):
        layer(X)


def test_a_weight_put_into_a_layer_of_another_description_is_refused():
    layer = linear()
    other = q4jax.Params4bit.quantize(jnp.ones((96, 128)), quant_type="fp4")
    layer.weight = to_variables(other)
    with pytest.raises(ValueError, match=r"LinearNF4 is nf4_b64_n256.*its weight is fp4_b64_n0"):
        layer(X)


def test_the_forward_changes_nothing():
    layer = linear()
    before = bits(from_variables(layer.weight)), str(jax.tree.structure(nnx.state(layer)))
    nnx.jit(lambda m, x: m(x))(layer, X)
    layer(X)
    assert (bits(from_variables(layer.weight)), str(jax.tree.structure(nnx.state(layer)))) == before


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quant_type": "int4"}, r"quant_type must be 'nf4' or 'fp4', got 'int4'"),
        ({"blocksize": 48}, r"invalid blocksize 48; allowed: \[32, 64"),
        ({"dtype": jnp.int8}, r"^dtype must be float32, float16 or bfloat16, got int8"),
        ({"param_dtype": jnp.int8}, r"param_dtype must be float32, float16 or bfloat16, got int8"),
        ({"kernel_init": lambda *a: jnp.full((128, 96), jnp.nan)}, r"kernel holds NaN or inf"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        linear(q4jax.Linear4bit, **settings)


def test_bad_compute_dtypes_of_other_layers():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="^dtype must be float32, float16 or bfloat16, got int8"):
        q4jax.EmbeddingNF4(8, 64, dtype=jnp.int8, rngs=rngs)
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got int8"):
        q4jax.LinearGeneral4bit(64, (4, 16), dtype=jnp.int8, rngs=rngs)


def test_fixed_types_take_no_other():
    with pytest.raises(TypeError, match="quant_type"):
        q4jax.LinearNF4(64, 64, quant_type="fp4", rngs=nnx.Rngs(0))


def test_wrong_inputs_are_named():
    layer = linear()
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 128\] .*got \[3, 64\]"):
        layer(X[:, :64])
    with pytest.raises(ValueError, match=r"x.dtype must be .*got int32"):
        layer(jnp.ones((1, 128), jnp.int32))


def test_from_linear_refuses_what_it_cannot_keep():
    with pytest.raises(TypeError, match=r"kernel: cannot quantize a LinearNF4.*quantized already"):
        q4jax.Linear4bit.from_linear(linear())
    odd = nnx.Linear(64, 64, dot_general=lambda *a, **k: None, rngs=nnx.Rngs(0))
    assert unsupported_reason(odd) == "its dot_general was replaced"


@pytest.mark.parametrize("cls", EMBEDDINGS)
@pytest.mark.parametrize("features", [64, 72], ids=["rows", "flat"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_embedding_rows_are_the_tables(cls, features, nested):
    embed = cls(50, features, compress_statistics=nested, rngs=nnx.Rngs(0))
    table = from_variables(embed.weight).dequantize()
    ids = jnp.array([[0, 49, 7], [3, -1, 7]])
    assert np.array_equal(embed(ids), table[ids])
    assert np.array_equal(nnx.jit(lambda m, i: m(i))(embed, ids), table[ids])
    np.testing.assert_allclose(embed.attend(table[:2]), table[:2] @ table.T, rtol=0, atol=1e-3)


def test_embedding_table_is_the_quantized_one_of_nnx_embed():
    dense = nnx.Embed(50, 64, rngs=nnx.Rngs(0))
    embed = q4jax.EmbeddingNF4(50, 64, rngs=nnx.Rngs(0))
    expected = q4jax.Params4bit.quantize(
        dense.embedding[...], quant_type="nf4", compress_statistics=True
    )
    assert bits(from_variables(embed.weight)) == bits(expected)


@pytest.mark.parametrize("cls", [q4jax.EmbeddingNF4, q4jax.EmbeddingFP4])
def test_embedding_of_signs_is_lossless(cls):
    signs = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (20, 64)), 1.0, -1.0)
    embed = cls(
        20, 64, embedding_init=lambda *_: signs, compress_statistics=False, rngs=nnx.Rngs(0)
    )
    assert np.array_equal(embed(jnp.arange(20)), signs)


def test_embedding_out_of_range_is_nan_and_floats_are_refused():
    embed = q4jax.EmbeddingNF4(50, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rows = embed(jnp.array([49, 50, -50, -51]))
    assert rows.dtype == jnp.bfloat16
    assert np.isnan(rows).all(-1).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"ids must be integers, got float32"):
        embed(jnp.ones(3))


def test_a_module_may_hold_a_bare_params4bit():
    class Mine(nnx.Module):
        def __init__(self):
            self.weight = q4jax.Params4bit.quantize(jnp.ones((4, 64)))

    graphdef, state = nnx.split(Mine())
    assert nnx.merge(graphdef, state).weight.quant_state.spec.tag() == "fp4_b64_n0_float32_4x64"


def test_a_layer_on_a_weight_that_is_quantized_already(rng):
    w = jnp.asarray(rng.normal(size=(32, 64)).astype("f4"))
    weight = q4jax.Params4bit.quantize(w, 32, True, "nf4")
    layer = q4jax.Linear4bit.from_weight(weight, dtype=jnp.bfloat16)
    assert layer.weight.packed.get_value() is weight.packed
    y = layer(jnp.ones((2, 64)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, q4jax.matmul_4bit(jnp.ones((2, 64), jnp.bfloat16), weight))
    assert type(q4jax.LinearNF4.from_weight(weight)) is q4jax.LinearNF4
    with pytest.raises(ValueError, match="LinearFP4 is fp4, the weight is nf4_b32_n256_"):
        q4jax.LinearFP4.from_weight(weight)
    with pytest.raises(ValueError, match="weight must be a matrix or a stack of them"):
        q4jax.Linear4bit.from_weight(q4jax.Params4bit.quantize(jnp.ones((2, 3, 5))))
