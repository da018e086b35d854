"""Products with one weight of a stack: the same as with that weight, and no copy of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.core.arrays_in_stack import ArraysInStack
from q4jax.ops import registry
from tests.support.random_arrays import normal
from tests.support.stacks import Stacks

LAYERS, EXPERTS, N, K = 3, 2, 40, 128


def quantize(w, nested=True, blocksize=64):
    return q4jax.Params4bit.quantize(w, blocksize, nested, "nf4")


@functools.cache
def stack_of(nested=True):
    one = functools.partial(quantize, nested=nested)
    return jax.vmap(jax.vmap(one))(normal(0, LAYERS, EXPERTS, N, K))


def at(stack, *index):
    return jax.tree.map(lambda a: a[index], stack)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def close(found, expected):
    """Equal, but for the order of sums."""
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected
    )


@pytest.fixture
def stacks(monkeypatch):
    yield Stacks.register(monkeypatch)
    jax.clear_caches()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("implementation", [None, "xla", "stacks", "pallas_interpret"])
def test_products_and_gradients(stacks, implementation, nested):
    stack, x = stack_of(nested), normal(1, 5, K)
    bias, g = normal(2, N), normal(3, 5, N)

    def product(x, bias, weight):
        return q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)

    def both(i, j):
        weight = q4jax.weight_of_stack(stack, i, j)
        y, vjp = jax.vjp(lambda x, bias: product(x, bias, weight), x, bias)
        return y, *vjp(g)

    y, vjp = jax.vjp(lambda x, bias: product(x, bias, at(stack, 2, 1)), x, bias)
    expected = y, *vjp(g)
    equal(both(2, 1), expected)
    close(jax.jit(both)(2, 1), expected)


def test_which_implementations_are_given_the_stack(stacks):
    weight, x = q4jax.weight_of_stack(stack_of(), 1, 1), normal(1, 5, K)
    y, vjp = jax.vjp(lambda x: q4jax.matmul_4bit(x, weight, implementation="stacks"), x)
    vjp(y)
    assert {arrays.stack.packed.shape for arrays in stacks.given} == {(LAYERS, EXPERTS, N, K // 2)}
    stacks.takes_stacks = False
    jax.clear_caches()
    q4jax.matmul_4bit(x, weight, implementation="stacks")
    assert stacks.given[-1].packed.shape == (N, K // 2)
    assert [registry.takes_stacks(name) for name in ("pallas", "xla", "native", None)] == [
        True, False, False, False,
    ]  # fmt: skip


def test_flat_has_one_leading_axis():
    weight = q4jax.weight_of_stack(stack_of(), 2, 1).arrays
    arrays, number = weight.flat()
    assert int(number) == 2 * EXPERTS + 1
    assert arrays.packed.shape == (LAYERS * EXPERTS, N, K // 2)
    assert arrays.offset.shape == (LAYERS * EXPERTS,)
    equal(jax.tree.map(lambda a: a[number], arrays), weight.cut())


def test_second_order(stacks):
    stack, x = stack_of(), normal(1, 3, K)

    def norm_of_gradient(x, weight):
        def loss(x):
            return (q4jax.matmul_4bit(x, weight, implementation="stacks") ** 2).sum()

        return (jax.grad(loss)(x) ** 2).sum()

    found = jax.grad(norm_of_gradient)(x, q4jax.weight_of_stack(stack, 1, 0))
    equal(found, jax.grad(norm_of_gradient)(x, at(stack, 1, 0)))


@pytest.mark.parametrize("batched", ["x", "index", "stack", "x and index"])
def test_vmap(stacks, batched):
    """A stack is not repeated for each of a batch; it is cut where each has a weight of its own."""
    stack, x = stack_of(), normal(1, LAYERS, 5, K)
    numbers = jnp.array([2, 0, 1])

    def product(x, stack, i):
        weight = q4jax.weight_of_stack(stack, *i)
        return q4jax.matmul_4bit(x, weight, implementation="stacks")

    one = jnp.int32(1)
    if batched == "x":
        found = jax.vmap(product, (0, None, None))(x, stack, (one, one))
        expected = [q4jax.matmul_4bit(x[b], at(stack, 1, 1)) for b in range(LAYERS)]
        assert type(stacks.given[-1]) is ArraysInStack
    elif batched == "stack":
        found = jax.vmap(product, (None, 0, None))(x[0], stack, (one,))
        expected = [q4jax.matmul_4bit(x[0], at(stack, b, 1)) for b in range(LAYERS)]
    else:
        x = x if batched == "x and index" else x[:1].repeat(LAYERS, 0)
        in_axes = (0 if batched == "x and index" else None, None, (0, None))
        found = jax.vmap(product, in_axes)(
            x if batched == "x and index" else x[0], stack, (numbers, one)
        )
        expected = [q4jax.matmul_4bit(x[b], at(stack, int(numbers[b]), 1)) for b in range(LAYERS)]
    close(found, jnp.stack(expected))
    if batched != "x":
        assert stacks.given[-1].packed.shape == (N, K // 2)


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_keeps_one_stack(stacks, remat):
    """The backward pass of a scan saves nothing of the weights, and computes the gradient."""
    stack = jax.vmap(quantize)(normal(0, 4, K, K) / 8)
    x = normal(1, 5, K)

    def loss(x, stack, scanned):
        def layer(x, own):
            weight = own if scanned else q4jax.weight_of_stack(stack, own)
            return jnp.tanh(q4jax.matmul_4bit(x, weight, implementation="stacks")), None

        layer = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(layer, x, stack if scanned else jnp.arange(4))[0].sum()

    of_numbers = jax.jit(jax.grad(functools.partial(loss, scanned=False)))
    expected = jax.jit(jax.grad(functools.partial(loss, scanned=True)))(x, stack)
    close(of_numbers(x, stack), expected)
    saved = [
        v.aval
        for e in jax.make_jaxpr(of_numbers)(x, stack).jaxpr.eqns[0].params["jaxpr"].eqns
        for v in e.outvars
        if e.primitive.name == "scan"
    ]
    assert saved
    assert not [aval for aval in saved if aval.dtype == jnp.uint8], saved


def test_other_functions_take_it_too():
    stack = stack_of()
    weight, own = q4jax.weight_of_stack(stack, 2, 0), at(stack, 2, 0)
    equal(q4jax.dequantize_4bit(weight), own.dequantize())
    equal(weight.dequantize(jnp.bfloat16), own.dequantize(jnp.bfloat16))
    layer = q4jax.weight_of_stack(stack, 2)
    equal(q4jax.weight_of_stack(layer, 0).arrays, weight.arrays)
    equal(layer.dequantize(), at(stack, 2).dequantize())
    assert repr(weight) == f"WeightOfStack({stack!r}, indices=[Array(2, dtype=int32), Array(0, " + (
        "dtype=int32)])"
    )


def test_blocks_that_cross_rows_are_cut():
    """The flat form has no rows to read; where its arrays are cut, it works."""
    stack = jax.vmap(functools.partial(quantize, blocksize=128))(normal(0, 3, 40, 192))
    x = normal(1, 5, 192)
    weight = q4jax.weight_of_stack(stack, 1)
    equal(q4jax.matmul_4bit(x, weight), q4jax.matmul_4bit(x, at(stack, 1)))
    with pytest.raises(NotImplementedError, match="needs rows that are whole blocks"):
        q4jax.matmul_4bit(x, weight, implementation="pallas_interpret")


def test_a_traced_index_is_clipped(stacks):
    stack, x = stack_of(), normal(1, 5, K)
    product = jax.jit(
        lambda i: q4jax.matmul_4bit(x, q4jax.weight_of_stack(stack, i, 1), implementation="stacks")
    )
    equal(product(7), product(LAYERS - 1))
    equal(product(-7), product(0))


@pytest.mark.parametrize("index", [(3, 0), (-1, 0), (0, 2), (np.int64(5),)])
def test_an_index_outside_of_the_stack(index):
    with pytest.raises(IndexError, match="an index must be at least 0 and below [23], got"):
        q4jax.weight_of_stack(stack_of(), *index)


def test_bad_arguments():
    stack = stack_of()
    with pytest.raises(ValueError, match=r"3 indices for the leading axes \[3, 2\]"):
        q4jax.weight_of_stack(stack, 0, 0, 0)
    with pytest.raises(ValueError, match=r"0 indices for the leading axes"):
        q4jax.weight_of_stack(stack)
    with pytest.raises(TypeError, match=r"an integer scalar, got float32\[\]"):
        q4jax.weight_of_stack(stack, 0.5)
    with pytest.raises(TypeError, match=r"an integer scalar, got int32\[2\]"):
        q4jax.weight_of_stack(stack, jnp.arange(2))
    joint = quantize(normal(0, LAYERS, 256, K))
    with pytest.raises(ValueError, match="share statistics: unstack it"):
        q4jax.weight_of_stack(joint, 0)
    q4jax.weight_of_stack(joint.unstack(), 0)
    with pytest.raises(ValueError, match=r"1 indices for the leading axes \[\]"):
        q4jax.weight_of_stack(at(stack, 0, 0), 0)
    x = normal(1, 5, K)
    with pytest.raises(ValueError, match="must be 2D"):
        q4jax.matmul_4bit(x, q4jax.weight_of_stack(stack, 0))
    with pytest.raises(TypeError, match="state must not be given"):
        q4jax.matmul_4bit(x, q4jax.weight_of_stack(stack, 0, 0), stack.quant_state)
    with pytest.raises(TypeError, match="is a 4-bit weight and no array"):
        q4jax.weight_of_stack(stack, 0, 0) + 1
    with pytest.raises(TypeError, match="x is the weight"):
        q4jax.matmul_4bit(q4jax.weight_of_stack(stack, 0, 0), x)
