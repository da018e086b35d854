"""A model that was called without `merge_quantized` says what to call."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import q4jax
from q4jax.linen import merge_quantized, quantize_model
from tests.linen.test_convert import Embedder

KEY, X = jax.random.key(0), jnp.ones((2, 64))
HINT = r"q4jax\.linen\.merge_quantized\(variables\)"


class Readers(nn.Module):
    """It reads its weight in one of the ways that models have."""

    how: str

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (64, 64))
        return {
            "einsum": lambda: jnp.einsum("bi,io->bo", x, w),
            "dot": lambda: jnp.dot(x, w),
            "matmul": lambda: x @ w,
            "transpose": lambda: x @ w.T,
            "rows": lambda: w[jnp.array([0])],
            "cast": lambda: x @ jnp.asarray(w, x.dtype),
        }[self.how]()


@pytest.mark.parametrize("how", ["einsum", "dot", "matmul", "transpose", "rows", "cast"])
def test_a_weight_that_is_read_too_early_says_so(how):
    q4jax.register_layer(Readers, lambda module, x: {"w": "bi,io->bo"})
    model = Readers(how)
    small = quantize_model(model, model.init(KEY, X), X)
    for apply in (model.apply, jax.jit(model.apply)):
        with pytest.raises((ValueError, AttributeError), match=rf"parameter 'w' is 4-bit.*{HINT}"):
            apply(small, X)
    assert model.apply(merge_quantized(small), X).shape[-1] == 64


@pytest.mark.parametrize(
    "model",
    [nn.Dense(32), nn.DenseGeneral((4, 8)), nn.MultiHeadDotProductAttention(4)],
    ids=lambda model: type(model).__name__,
)
def test_layers_of_flax_say_so(model):
    small = quantize_model(model, model.init(KEY, X), X)
    with pytest.raises(ValueError, match=rf"kernel' is 4-bit, in the collection 'quant'.*{HINT}"):
        model.apply(small, X)


def test_a_mark_is_no_array_to_optimizers_and_gradients():
    model = nn.Dense(32)
    small = quantize_model(model, model.init(KEY, X), X)

    def loss(params):
        return model.apply(merge_quantized({**small, "params": params}), X).sum()

    params, tx = small["params"], optax.adamw(0.1)
    grads = jax.grad(loss)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert [leaf.shape for leaf in jax.tree.leaves(new)] == [(32,)]
    assert loss(new) < loss(params)


def test_a_weight_that_is_nowhere_is_named():
    model = nn.Dense(32)
    small = quantize_model(model, model.init(KEY, X), X)
    with pytest.raises(ValueError, match="kernel is 4-bit, but not in 'quant' of variables"):
        merge_quantized({"params": small["params"]})


def test_embeddings_say_so():
    q4jax.register_layer(Embedder, lambda module: {"table": q4jax.KernelAxes((96, 64), (1,))})
    model, ids = Embedder(96, 64), jnp.array([1])
    variables = model.init(KEY, ids, method="encode")
    small = quantize_model(model, variables, ids, method="encode")
    with pytest.raises(ValueError, match=HINT):
        model.apply(small, ids, method="encode")
