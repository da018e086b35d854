"""Losing or mixing up the state is impossible, whatever carries the weight."""

import copy
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax import Params4bit, QuantState
from q4jax.core.state import split_tag

KINDS = ["plain", "nested", "flat"]


@pytest.fixture(params=KINDS)
def weight(request):
    w = jax.random.normal(jax.random.key(0), (8, 40) if request.param == "flat" else (8, 128))
    return Params4bit.quantize(w, 64, request.param != "plain", "nf4")


def assert_whole(found, weight):
    assert isinstance(found, Params4bit)
    assert isinstance(found.quant_state, QuantState)
    assert found.quant_state.spec == weight.quant_state.spec
    assert jax.tree.structure(found) == jax.tree.structure(weight)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, weight)


def activation(weight, *lead):
    return jax.random.normal(jax.random.key(1), (*lead, weight.quant_state.shape[1]))


def through_scan_carry(weight):
    return jax.lax.scan(lambda carry, _: (carry, None), weight, length=3)[0]


def through_scan_xs(weight):
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), weight)
    _, out = jax.lax.scan(lambda _, w: (None, w), None, stacked)
    return jax.tree.map(lambda a: a[1], out)


def through_vmap(weight):
    stacked = jax.tree.map(lambda a: a[None], weight)
    return jax.tree.map(lambda a: a[0], jax.vmap(lambda w: w)(stacked))


def through_donation(weight):
    return jax.jit(lambda w: w, donate_argnums=0)(jax.tree.map(jnp.copy, weight))


def through_leaves(weight):
    leaves, treedef = jax.tree.flatten(weight)
    return jax.tree.unflatten(treedef, leaves)


def through_paths(weight):
    leaves, treedef = jax.tree_util.tree_flatten_with_path(weight)
    return jax.tree.unflatten(treedef, [leaf for _, leaf in leaves])


def through_cond(weight):
    return jax.jit(lambda p, w: jax.lax.cond(p, lambda w: w, lambda w: w, w))(True, weight)


def through_while(weight):
    return jax.lax.fori_loop(0, 3, lambda _, w: w, weight)


def through_callback(weight):
    shapes = jax.eval_shape(lambda w: w, weight)
    return jax.jit(lambda w: jax.pure_callback(lambda w: w, shapes, w))(weight)


@pytest.mark.parametrize(
    "carry",
    [
        jax.jit(lambda w: w),
        jax.checkpoint(lambda w: w),
        lambda w: jax.tree.map(lambda a: a, w),
        lambda w: jax.device_put(w, jax.devices()[0]),
        lambda w: jax.device_put(jax.device_get(w)),
        lambda w: pickle.loads(pickle.dumps(w)),
        copy.copy,
        copy.deepcopy,
        jax.block_until_ready,
        lambda w: jax.vjp(lambda w: w, w)[0],
        jax.lax.stop_gradient,
        through_scan_carry,
        through_scan_xs,
        through_vmap,
        through_donation,
        through_leaves,
        through_paths,
        through_cond,
        through_while,
        through_callback,
    ],
)
def test_carried_whole(carry, weight):
    assert_whole(carry(weight), weight)


def test_eval_shape_keeps_the_state(weight):
    shapes = jax.eval_shape(lambda w: w, weight)
    assert jax.tree.structure(shapes) == jax.tree.structure(weight)
    found, expected = ([(a.shape, a.dtype) for a in jax.tree.leaves(t)] for t in (shapes, weight))
    assert found == expected
    x = jax.ShapeDtypeStruct((3, weight.quant_state.shape[1]), jnp.float32)
    assert jax.eval_shape(q4jax.matmul_4bit, x, shapes).shape == (3, 8)


def test_quantizing_under_jit_returns_a_state():
    w = jax.random.normal(jax.random.key(0), (8, 128))
    packed, state = jax.jit(q4jax.quantize_4bit)(w)
    assert_whole(Params4bit(packed, state), Params4bit.quantize(w))


def test_gradient_through_a_function_that_holds_a_weight(weight):
    x = activation(weight, 3)

    def loss(params):
        return (q4jax.matmul_4bit(x * params["scale"], params["weight"]) ** 2).sum()

    params = {"scale": jnp.float32(2), "weight": weight}
    held = jax.grad(lambda s: loss({"scale": s, "weight": weight}))(params["scale"])
    full = jax.jit(jax.grad(loss, allow_int=True))(params)
    np.testing.assert_allclose(full["scale"], held, rtol=1e-6)
    assert jax.tree.structure(full["weight"]) == jax.tree.structure(weight)
    assert full["weight"].packed.dtype == jax.dtypes.float0


def test_remat_changes_nothing(weight):
    x = activation(weight, 3)

    def loss(x):
        return jnp.sin(q4jax.matmul_4bit(x, weight)).sum()

    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(x), jax.grad(loss)(x), rtol=1e-6)


def test_donated_activation_leaves_the_weight(weight):
    step = jax.jit(lambda x, w: x + q4jax.matmul_4bit(x, w).sum(), donate_argnums=0)
    x = activation(weight, 3)
    np.testing.assert_array_equal(step(jnp.copy(x), weight), step(jnp.copy(x), weight))


def test_forward_and_backward_leave_the_weight(weight):
    before = jax.tree.map(np.array, weight)
    jax.grad(lambda x: q4jax.matmul_4bit(x, weight).sum())(activation(weight, 3))
    assert_whole(weight, before)


def test_export(weight):
    x = activation(weight, 3)
    leaves, treedef = jax.tree.flatten(weight)

    def apply(x, leaves):  # an exported function takes arrays in plain containers
        weight = jax.tree.unflatten(treedef, leaves)
        return q4jax.matmul_4bit(x, weight, implementation="xla")

    exported = jax.export.export(jax.jit(apply))(x, leaves)
    np.testing.assert_array_equal(exported.call(x, leaves), apply(x, leaves))


CHANGES = [
    {"quant_type": "fp4"},
    {"blocksize": 32},
    {"nested_blocksize": 0},
    {"dtype": "bfloat16"},
    {"shape": (4, 256)},
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_spec_is_another_structure(change):
    state = Params4bit.quantize(jnp.ones((8, 128)), 64, True, "nf4").quant_state
    spec = replace(state.spec, **change)
    extra = (state.nested_absmax, state.offset) if spec.nested else (None, None)
    other = QuantState(state.absmax, *extra, spec)
    assert jax.tree.structure(other) != jax.tree.structure(state)
    # AttributeError: jax 0.10.2 fails to word its error where the number of leaves differs too.
    with pytest.raises((ValueError, AttributeError), match=r"[Mm]ismatch|structure|GetAttrKey"):
        jax.tree.map(lambda a, b: a, state, other)
    keys = [{jax.tree_util.keystr(k) for k, _ in paths(s)} for s in (state, other)]
    assert not keys[0] & keys[1]  # nor does a checkpoint take one for the other


def paths(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_key_paths_carry_the_tag(weight):
    (packed, _), *scales = paths(weight)
    assert jax.tree_util.keystr(packed) == ".packed"
    names = ["absmax", "nested_absmax", "offset"][: len(scales)]
    for (path, _), name in zip(scales, names, strict=True):
        assert path[0].name == "quant_state"
        assert split_tag(path[1].name) == (name, weight.quant_state.spec)


@pytest.mark.parametrize("key", ["absmax", "absmax_nf4_b64_n0_float32_8x128", "absmax__nf4", ""])
def test_split_tag_refuses(key):
    with pytest.raises(ValueError, match="not the"):
        split_tag(key)


def test_vmap_over_rows_does_not_copy_the_weight():
    weight = q4jax.Params4bit.quantize(jnp.ones((128, 256)), 64, True, "nf4")
    x = jax.random.normal(jax.random.key(0), (5, 3, 256))

    def loss(x):
        return jax.vmap(lambda x: q4jax.matmul_4bit(x, weight))(x).sum()

    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    assert "128x128xui8" in text and "5x128x128xui8" not in text
    y = jax.vmap(jax.vmap(lambda x: q4jax.matmul_4bit(x, weight)))(x)
    np.testing.assert_allclose(y, q4jax.matmul_4bit(x, weight), rtol=1e-6, atol=1e-6)
