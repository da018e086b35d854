"""One weight of a stack on a mesh: its rows, its columns or the stack itself split over devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import q4jax
from tests.support.meshes import AUTO, EXPLICIT, mesh_of, normal, place, put

LAYERS, EXPERTS, N, K = 3, 4, 64, 256
SPLITS = {
    "rows": P(None, None, "part"),
    "columns": P(None, None, None, "part"),
    "experts": P(None, "part"),
    "experts and rows": P(None, "part", "batch"),
    "layers": P("part"),
}


def stack_of(nested, layers=LAYERS):
    def quantize(w):
        return q4jax.Params4bit.quantize(w, 64, nested, "nf4")

    return jax.vmap(jax.vmap(quantize))(normal(0, layers, EXPERTS, N, K))


def both(x, bias, stack, numbers, implementation):
    """A product with each of some experts of two layers, and its gradients."""

    def product(x, bias, number):
        weight = q4jax.weight_of_stack(stack, *number)
        return q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)

    def loss(x, bias):
        steps = jax.lax.scan(lambda _, i: (None, product(x, bias, i)), None, numbers)[1]
        return jnp.sum(steps**2), steps

    return jax.grad(loss, (0, 1), has_aux=True)(x, bias)


CASES = [
    *(("pallas_interpret", split, True, kind) for split in SPLITS for kind in (AUTO, EXPLICIT)),
    *(("pallas_interpret", split, False, EXPLICIT) for split in ("rows", "columns")),
    *(("xla", split, False, AUTO) for split in ("columns", "experts and rows")),
]


@pytest.mark.parametrize(("implementation", "split", "nested", "kind"), CASES)
def test_products_and_gradients(implementation, split, nested, kind):
    stack = stack_of(nested, 4 if split == "layers" else LAYERS)
    x, bias = normal(1, 4, K), normal(2, N)
    numbers = jnp.array([0, 2, 2]), jnp.array([3, 0, 1])
    expected = both(x, bias, stack, numbers, "xla")
    mesh = mesh_of(kind, batch=2, part=4)
    args = put(x, mesh, "batch"), put(bias, mesh), place(stack, mesh, SPLITS[split])
    with jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext():
        found = jax.jit(both, static_argnums=4)(*args, numbers, implementation)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_split_experts_stay_where_they_are(implementation, moved):
    """What moves is products: no codes, and no decoded weight."""
    mesh, x, bias = mesh_of(part=4), normal(1, 4, K), normal(2, N)
    stack = place(stack_of(True), mesh, SPLITS["experts"])
    numbers = jnp.array([0, 2, 2]), jnp.array([3, 0, 1])
    found = moved(jax.jit(both, static_argnums=4), x, bias, stack, numbers, implementation)
    assert found
    assert all(c.is_float and c.size <= x.size for c in found), found
