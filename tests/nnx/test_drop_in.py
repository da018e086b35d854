"""4-bit layers in the place of Flax's: called alike, and what they show of the dense kernel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax

RULES = [
    q4jax.QuantRule("attend|tokens", quant_type="nf4", embeddings=True),
    q4jax.QuantRule(quant_type="nf4"),
]
PAIRS = [
    (nnx.Linear, q4jax.Linear4bit),
    (nnx.LinearGeneral, q4jax.LinearGeneral4bit),
    (nnx.Einsum, q4jax.Einsum4bit),
    (nnx.Embed, q4jax.Embedding4bit),
]


class Model(nnx.Module):
    """One layer of each class."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(64, 32, rngs=rngs)
        self.general = nnx.LinearGeneral(64, (4, 16), rngs=rngs)
        self.mixing = nnx.Einsum("btd,ndh->btnh", (4, 64, 16), (4, 16), rngs=rngs)
        self.tokens = nnx.Embed(8, 64, rngs=rngs)


@pytest.fixture
def dense():
    return Model(nnx.Rngs(0))


@pytest.fixture
def small(dense):
    return q4jax.quantize_model(dense, RULES)


def arguments(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("dense", "quantized"), PAIRS)
def test_calls_have_the_signature_of_the_layer_that_is_replaced(dense, quantized):
    assert arguments(quantized.__call__) == arguments(dense.__call__)
    if hasattr(dense, "attend"):
        assert arguments(quantized.attend) == arguments(dense.attend)


X, IDS = jnp.ones((2, 3, 64)) / 8, jnp.array([[1, 7]])
CALLS = {
    "by name": lambda m: [
        m.linear(inputs=X, out_sharding=None),
        m.general(inputs=X, out_sharding=None),
        m.mixing(inputs=X, einsum_str=None, out_sharding=None),
        m.tokens(inputs=IDS, out_sharding=None),
        m.tokens.attend(query=X, out_sharding=None),
    ],
    "by position": lambda m: [
        m.linear(X, None),
        m.general(X, None),
        m.mixing(X, None, None),
        m.tokens(IDS, None),
        m.tokens.attend(X, None),
    ],
    "with an equation": lambda m: [
        m.mixing(X, "abd,ndh->abnh"),
        m.mixing(X[0], "td,ndh->tnh"),
    ],
}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_each_form_of_a_call_computes_what_the_dense_layer_does(small, calls, adapters):
    dense = q4jax.dequantize_model(small)
    if adapters:
        names = "linear|general|mixing|tokens"
        small = q4jax.add_lora(small, rank=4, alpha=8, targets=names)
        for path, value in nnx.iter_graph(small):
            if isinstance(value, nnx.LoRAParam):
                key = jax.random.fold_in(jax.random.key(3), len(path))
                value[...] = jax.random.normal(key, value.shape) / 8
        dense = q4jax.merge_lora(small)
    for found, expected in zip(calls(small), calls(dense), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(abs(expected).max()))


def test_an_equation_that_needs_other_blocks_is_refused(small):
    with pytest.raises(ValueError, match="'bth,ndh->btnd' sums over other axes"):
        small.mixing(jnp.ones((2, 3, 16)), "bth,ndh->btnd")
    with pytest.raises(ValueError, match="in one place only"):
        small.mixing(X, "btd,ndh->bth")


KERNELS = [
    lambda m: m.linear.kernel,
    lambda m: m.general.kernel,
    lambda m: m.mixing.kernel,
    lambda m: m.tokens.embedding,
]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=["linear", "general", "einsum", "embed"])
def test_the_dense_kernel_is_shown_and_made(dense, small, kernel, adapters):
    original = kernel(dense)
    expected = kernel(q4jax.dequantize_model(small))[...]
    if adapters:
        names = "linear|general|mixing|tokens"
        small = q4jax.add_lora(small, rank=4, alpha=8, targets=names)
    view = kernel(small)
    assert (view.shape, view.dtype, view.ndim, view.size) == (
        original.shape,
        original.dtype,
        original.ndim,
        original.size,
    )
    np.testing.assert_array_equal(view.dequantize(), expected)
    assert view.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_the_kernels_of_a_stack_have_its_axis():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return Model(rngs)

    stack = make(nnx.Rngs(0))
    small = q4jax.quantize_model(stack, RULES)
    for kernel in KERNELS:
        assert kernel(small).shape == kernel(stack).shape
        assert kernel(small).dequantize().shape == kernel(stack).shape
    shapes = nnx.vmap(lambda model: jnp.zeros(model.linear.kernel.shape))(small)
    assert shapes.shape == (3, 64, 32)


def test_the_shown_kernel_is_no_state(small):
    graph, state = nnx.split(small)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    assert not [p for p in paths if p.endswith(("kernel", "embedding"))]
    assert nnx.merge(graph, state).linear.kernel.shape == (64, 32)
    abstract = nnx.eval_shape(lambda: q4jax.Linear4bit(64, 32, rngs=nnx.Rngs(0)))
    assert abstract.kernel.shape == (64, 32)


USES = {
    "index": lambda k: k[...],
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "product": lambda k: jnp.ones((2, 64)) @ k,
    "numpy product": lambda k: np.ones((2, 64)) @ k,
    "sum": lambda k: k + 1,
    "len": len,
    "iteration": list,
    "value": lambda k: k.value,
    "transpose": lambda k: k.T,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use_as_an_array_says_how_to_dequantize(small, use):
    with pytest.raises((TypeError, AttributeError), match=r"layer\.kernel\.dequantize\(\)"):
        use(small.linear.kernel)
    with pytest.raises((TypeError, AttributeError), match=r"layer\.embedding\.dequantize\(\)"):
        use(small.tokens.embedding)
