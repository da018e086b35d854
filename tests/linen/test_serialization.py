"""flax.serialization of 4-bit weights: what goes out comes back, and nothing else goes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

from q4jax import Params4bit, linen

KEY = jax.random.key(0)
X = jnp.ones((2, 128))
LAYER = linen.LinearNF4(64)
TAG = "nf4_b64_n256_float32_64x128"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layer", [LAYER, linen.Linear4bit(64, compress_statistics=False)])
@pytest.mark.parametrize("width", [128, 100])
def test_round_trip(layer, width):
    x = X[:, :width]
    variables = layer.init(KEY, x)
    data = serialization.to_bytes(variables)
    other = layer.init(jax.random.key(1), x)
    for target in (other, jax.eval_shape(layer.init, KEY, x)):
        restored = serialization.from_bytes(target, data)
        assert_same(restored, variables)
        for apply in (layer.apply, jax.jit(layer.apply)):
            np.testing.assert_array_equal(apply(restored, x), layer.apply(variables, x))
    weight = variables["quant"]["weight"]
    assert_same(serialization.from_bytes(weight, serialization.to_bytes(weight)), weight)
    state = weight.quant_state
    assert_same(serialization.from_bytes(state, serialization.to_bytes(state)), state)


def test_round_trip_of_an_embedding():
    layer, ids = linen.EmbeddingNF4(10, 64), jnp.array([1, 2])
    variables = layer.init(KEY, ids)
    restored = serialization.from_bytes(variables, serialization.to_bytes(variables))
    for apply in (layer.apply, jax.jit(layer.apply)):
        np.testing.assert_array_equal(apply(restored, ids), layer.apply(variables, ids))


def test_round_trip_of_a_stack():
    weights = jax.vmap(lambda w: Params4bit.quantize(w, check_finite=False))(
        jax.random.normal(KEY, (3, 8, 64))
    )
    data = serialization.to_bytes({"w": weights})
    assert_same(serialization.from_bytes({"w": weights}, data)["w"], weights)
    one = jax.tree.map(lambda leaf: leaf[0], weights)
    with pytest.raises(ValueError, match=r"absmax.* float32\[8, 1\].* holds float32\[3, 8, 1\]"):
        serialization.from_bytes({"w": one}, data)


def test_round_trip_of_boxes():
    layer = linen.LinearNF4(
        64, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    )
    variables = layer.init(KEY, X)
    assert_same(serialization.from_bytes(variables, serialization.to_bytes(variables)), variables)


def test_state_dict_names():
    state = serialization.to_state_dict(LAYER.init(KEY, X))["quant"]["weight"]
    assert list(state) == ["packed", "quant_state"]
    names = ("absmax", "nested_absmax", "offset")
    assert list(state["quant_state"]) == [f"{name}__{TAG}" for name in names]


@pytest.mark.parametrize(
    ("other", "held"),
    [
        (linen.LinearFP4(64), "fp4_b64_n256_float32_64x128"),
        (linen.LinearNF4(64, blocksize=32), "nf4_b32_n256_float32_64x128"),
        (linen.LinearNF4(64, compress_statistics=False), "nf4_b64_n0_float32_64x128"),
        (linen.LinearNF4(64, param_dtype=jnp.float16), "nf4_b64_n256_float16_64x128"),
        (linen.LinearNF4(32), "nf4_b64_n256_float32_32x128"),
    ],
)
def test_bytes_of_another_weight(other, held):
    mine, theirs = LAYER.init(KEY, X), other.init(KEY, X)
    into_mine = f"^./quant/weight/quant_state: the target is {TAG}, the state dict holds {held}$"
    with pytest.raises(ValueError, match=into_mine):
        serialization.from_bytes(mine, serialization.to_bytes(theirs))
    with pytest.raises(ValueError, match=f"the target is {held}, the state dict holds {TAG}$"):
        serialization.from_bytes(theirs, serialization.to_bytes(mine))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("extra", 1, r"lacks \[\] and has unknown \['extra'\]"),
        ("packed", None, r"lacks \['packed'\] and has unknown \[\]"),
        ("quant_state", None, r"lacks \['quant_state'\]"),
        (f"quant_state/offset__{TAG}", None, rf"quant_state: .* lacks \['offset__{TAG}'\]"),
        ("quant_state/junk", 1, r"quant_state: .* unknown \['junk'\]"),
        ("quant_state", 3, "expected a dict of .*absmax.* got int"),
        ("", jnp.ones(3), r"expected a dict of \['packed', 'quant_state'\], got float32\[3\]"),
        (
            "packed",
            jnp.zeros((64, 64), jnp.bfloat16),
            r"the target has packed uint8\[64, 64\], the state dict holds bfloat16\[64, 64\]",
        ),
        ("packed", jnp.zeros((1, 64), jnp.uint8), r"uint8\[64, 64\], .* uint8\[1, 64\]"),
        ("packed", "x", r"packed uint8\[64, 64\], the state dict holds str"),
    ],
)
def test_state_dicts_that_do_not_fit(path, value, message):
    weight = LAYER.init(KEY, X)["quant"]["weight"]
    state = {"": serialization.to_state_dict(weight)}
    *parents, name = ["", *path.split("/")] if path else [""]
    node = state
    for parent in parents:
        node = node[parent]
    node[name] = value
    if value is None:
        del node[name]
    with pytest.raises(ValueError, match=message):
        serialization.from_state_dict(weight, state[""])


def test_missing_collections_are_flax_errors():
    variables = LAYER.init(KEY, X)
    dense = nn.Dense(64).init(KEY, X)
    with pytest.raises(ValueError, match="quant"):
        serialization.from_bytes(variables, serialization.to_bytes(dense))
    with pytest.raises(ValueError, match="kernel"):
        serialization.from_bytes(dense, serialization.to_bytes(variables))
