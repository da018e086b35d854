"""`Params4bit`: stacked and joint forms, containers of codes, size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax import Params4bit
from tests.support import oracle


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape, dtype)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), a, b)


def at(tree, *index):
    return jax.tree.map(lambda a: a[index], tree)


@pytest.mark.parametrize("shape", [(4, 64), (5, 9)])
def test_stacked_gives_every_array_the_leading_axes(shape):
    def quantize(w):
        return Params4bit.quantize(w, 64, True, "nf4")

    w = normal(2, 3, *shape)
    stacked = jax.vmap(jax.vmap(quantize))(w)
    assert all(a.shape[:2] == (2, 3) for a in jax.tree.leaves(stacked))
    assert (stacked.quant_state.lead, stacked.quant_state.shape) == ((2, 3), (2, 3, *shape))
    assert_same(at(stacked, 1, 2), quantize(w[1, 2]))
    assert_same(jax.tree.map(lambda *a: jnp.stack(a), *(at(stacked, i) for i in range(2))), stacked)
    assert stacked.dequantize().shape == w.shape
    assert_same(stacked.dequantize()[1, 2], quantize(w[1, 2]).dequantize())


@pytest.mark.parametrize("nested", [False, True])
def test_scan_over_stacked(nested):
    w, x = normal(3, 64, 64), normal(5, 64)
    stacked = jax.vmap(lambda w: Params4bit.quantize(w, 64, nested, "nf4"))(w)
    y, _ = jax.lax.scan(lambda x, weight: (q4jax.matmul_4bit(x, weight), None), x, stacked)
    expected = x
    for i in range(3):
        expected = q4jax.matmul_4bit(expected, at(stacked, i))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * float(abs(expected).max()))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 64), (2, 3, 4, 64), (3, 5, 9)])
def test_joint_bytes_are_those_of_the_flat_weight(shape, nested):
    w = normal(*shape)
    joint = Params4bit.quantize(w, 64, nested, "nf4")
    flat = Params4bit.quantize(w.reshape(1, -1), 64, nested, "nf4")
    for a, b in zip(jax.tree.leaves(joint), jax.tree.leaves(flat), strict=True):
        np.testing.assert_array_equal(a.ravel(), b.ravel())
    assert joint.quant_state.shape == shape
    assert_same(joint.dequantize(), flat.dequantize().reshape(shape))
    if nested:
        assert joint.quant_state.offset.shape == ()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(3, 256, 64), (2, 2, 256, 64), (3, 512, 32)])  # the last is flat
def test_unstack(shape, nested):
    joint = Params4bit.quantize(normal(*shape), 64, nested, "nf4")
    stacked = joint.unstack()
    lead = shape[:-2]
    assert all(a.shape[: len(lead)] == lead for a in jax.tree.leaves(stacked))
    assert stacked.quant_state.spec.shape == shape[-2:]
    assert_same(stacked.dequantize(), joint.dequantize())
    per_matrix = jax.vmap(Params4bit.dequantize)
    for _ in lead[1:]:
        per_matrix = jax.vmap(per_matrix)
    assert_same(per_matrix(stacked), joint.dequantize())
    assert_same(stacked.unstack(), stacked)


@pytest.mark.parametrize("shape", [(64, 64), (5, 9), (64,)])
def test_unstack_of_one_matrix_is_itself(shape):
    weight = Params4bit.quantize(normal(*shape), 64, True, "nf4")
    assert_same(weight.unstack(), weight)


@pytest.mark.parametrize(
    ("shape", "nested", "why"),
    [
        ((3, 5, 9), False, "5x9 is not a whole number of blocks of 64"),
        ((3, 100, 64), True, "100 blocks of a matrix are not a multiple of 256"),
        ((3, 128, 96), True, "192 blocks of a matrix are not a multiple of 256"),
    ],
)
def test_unstack_refuses(shape, nested, why):
    joint = Params4bit.quantize(normal(*shape), 64, nested, "nf4")
    with pytest.raises(ValueError, match=why):
        joint.unstack()


@pytest.mark.parametrize("storage", ["uint8", "int8", "bfloat16", "float16", "float32", "float64"])
def test_any_container_of_codes(storage):
    weight = Params4bit.quantize(normal(6, 64), 64, True, "nf4")
    codes = np.asarray(weight.packed).reshape(-1)
    container = codes.view(oracle.DTYPES.get(storage, storage)).reshape(-1, 1)
    stats = weight.quant_state.as_dict(packed=True)
    assert_same(Params4bit.from_prequantized(container, stats), weight)


def test_state_dict_does_not_share_memory_with_the_weight():
    weight = Params4bit.quantize(normal(6, 64), 64, True, "nf4")
    before = jax.tree.map(np.array, weight)
    for array in weight.state_dict().values():
        if array.flags.writeable:
            array[...] = 0
    assert_same(before, jax.tree.map(np.asarray, weight))


@pytest.mark.parametrize(("nested", "bits"), [(False, 4.51), (True, 4.13)])
def test_bits_per_weight(nested, bits):
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    weight = jax.eval_shape(lambda w: Params4bit.quantize(w, 64, nested, "nf4"), w)
    assert 4 < weight.nbytes * 8 / 4096**2 <= bits


def test_is_not_taken_for_an_array():
    weight = Params4bit.quantize(normal(2, 64))
    assert not hasattr(weight, "shape")
    assert not hasattr(weight, "dtype")


@pytest.mark.parametrize("name", ["packed", "quant_state", "anything"])
def test_immutable(name):
    with pytest.raises(AttributeError, match=f"Params4bit is immutable; cannot set '{name}'"):
        setattr(Params4bit.quantize(normal(2, 64)), name, None)


def test_repr_is_one_line_with_the_tag():
    weight = Params4bit.quantize(normal(2, 64), quant_type="nf4")
    assert repr(weight) == "Params4bit(uint8[2, 32], nf4_b64_n0_float32_2x64)"
    assert "\n" not in repr(jax.tree.structure(weight))


USES = {
    "numpy": np.asarray,
    "numpy dtype": lambda w: np.array(w, np.float32),
    "jax": jnp.asarray,
    "jax sum": jnp.sum,
    "add": lambda w: w + 1,
    "radd": lambda w: 1.0 + w,
    "multiply": lambda w: jnp.ones(3) * w,
    "negate": lambda w: -w,
    "compare": lambda w: w > 0,
    "product": lambda w: jnp.ones((2, 64)) @ w,
    "numpy product": lambda w: np.ones((2, 64)) @ w,
    "product from the left": lambda w: w @ jnp.ones((64, 2)),
    "len": len,
    "iteration": list,
    "unpack": lambda w: tuple(w),
    "index": lambda w: w[0],
    "contains": lambda w: 1 in w,
    "float": float,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("traced", [False, True])
def test_use_as_an_array_names_what_to_call(use, traced):
    weight = Params4bit.quantize(normal(4, 64))
    names = r"no array: q4jax\.matmul_4bit\(x, weight\) is .* weight\.dequantize\(\) the array"
    with pytest.raises(TypeError, match=names):
        jax.jit(lambda w: use(w) and None)(weight) if traced else use(weight)


@pytest.mark.parametrize("name", ["shape", "dtype", "ndim", "T", "astype", "sharding"])
def test_it_has_no_attribute_of_arrays_and_says_where_they_are(name):
    weight = Params4bit.quantize(normal(4, 64))
    assert not hasattr(weight, name)
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*weight.quant_state has its"):
        getattr(weight, name)


def test_it_is_true_hashable_and_equal_to_itself():
    weight = Params4bit.quantize(normal(4, 64))
    assert weight
    assert weight == weight
    assert {weight: 1}[weight] == 1
    assert jnp.shape(weight.packed) == (4, 32)
