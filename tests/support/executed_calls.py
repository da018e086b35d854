"""Public calls through an executor of compiled kernels, by Pallas or by Triton."""

import functools

import jax
import jax.numpy as jnp

import q4jax
from tests.support.products import assert_product
from tests.support.random_arrays import decoded, normal, random_weight

ROUNDINGS = 16  # of sums that are split over programs


def check_vmap(executor, implementation, batched):
    """Compare a product mapped over "x", "weight" or "both" with one for each; one launch."""
    many = [random_weight((70, 320), 64, True) for _ in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *many)
    x = normal(1, 3, 5, 320)
    axes = {"x": (0, None), "weight": (None, 0), "both": (0, 0)}[batched]
    args = x if axes[0] == 0 else x[0], stack if axes[1] == 0 else many[0]
    matmul = functools.partial(q4jax.matmul_4bit, implementation=implementation)
    y = executor(jax.vmap(matmul, axes), *args)
    for i in range(3):
        weight = decoded(many[i] if axes[1] == 0 else many[0])
        assert_product(y[i], x[i] if axes[0] == 0 else x[0], weight, roundings=ROUNDINGS)
    assert len(executor.launches) == 1


def check_gradient(executor, implementation):
    """Compare a product and its gradient; the transposed one comes from differentiating."""
    weight, x, g = random_weight((70, 192)), normal(1, 5, 192), normal(2, 5, 70)

    def both(x, g):
        matmul = functools.partial(q4jax.matmul_4bit, implementation=implementation)
        y, vjp = jax.vjp(lambda x: matmul(x, weight), x)
        return y, *vjp(g)

    y, dx = executor(both, x, g)
    w = decoded(weight)
    assert_product(y, x, w, roundings=ROUNDINGS)
    assert_product(dx, g, w.T, roundings=ROUNDINGS)
    assert {e.name for e in executor.launches} == {"q4jax_linear", "q4jax_linear_transpose"}
