"""The kernels under every transformation, through the public functions."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import q4jax
from q4jax.native import implementation
from q4jax.ops.registry import IMPLEMENTATIONS
from tests.support.native_kernels import in_use
from tests.support.products import assert_product
from tests.support.random_arrays import normal, random_weight

pytestmark = in_use


def matmul(x, weight, bias=None):
    return q4jax.matmul_4bit(x, weight, bias=bias, implementation="native")


def test_both_halves_of_quantization_are_the_default():
    quantize = jax.jit(lambda w: q4jax.quantize_4bit(w, 64, True, "nf4"))
    text = quantize.lower(normal(1, 96, 128)).as_text()
    assert "q4jax_quantize_scales" in text
    assert text.count("q4jax_quantize") == 2


def test_second_order_gradients():
    weight, x = random_weight((96, 128)), normal(1, 5, 128)
    check_grads(
        lambda x: jnp.tanh(matmul(x, weight) / 8), (x,), order=2, modes=["rev"], rtol=2e-2, eps=1e-2
    )


def test_named_and_preferred_agree():
    weight, x = random_weight((96, 128)), normal(1, 3, 128)
    np.testing.assert_array_equal(matmul(x, weight), q4jax.matmul_4bit(x, weight))


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(check_vma):
    weight, x = random_weight((96, 128)), normal(1, 4, 128)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda x: matmul(x, weight),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    np.testing.assert_array_equal(jax.jit(sharded)(x), matmul(x, weight))


def test_export_names_the_calls():
    """An exported program needs the kernels where it runs, which its maker has to say."""
    weight, x = random_weight((96, 128)), normal(1, 3, 128)
    leaves, treedef = jax.tree.flatten(weight)

    def apply(x, leaves):
        return matmul(x, jax.tree.unflatten(treedef, leaves))

    with pytest.raises(ValueError, match="q4jax_linear"):
        jax.export.export(jax.jit(apply))(x, leaves)
    allowed = [jax.export.DisabledSafetyCheck.custom_call("q4jax_linear")]
    exported = jax.export.export(jax.jit(apply), disabled_checks=allowed)(x, leaves)
    np.testing.assert_array_equal(exported.call(x, leaves), matmul(x, weight))


def test_calls_from_many_threads():
    """Each with a size of its own, so that none can be right by another's result."""
    weight = random_weight((640, 1024), 64, False)
    w = weight.dequantize(implementation="xla")
    run = jax.jit(matmul)
    inputs = [normal(i, m, 1024) for i, m in enumerate((1, 4, 16, 33, 1, 4, 16, 33))]
    expected = [np.asarray(run(x, weight)) for x in inputs]
    for x, y in zip(inputs, expected, strict=True):
        assert_product(y, x, w)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            for found, y in zip(pool.map(lambda x: run(x, weight), inputs), expected, strict=True):
                np.testing.assert_array_equal(found, y)


def test_what_is_not_served_is_left_to_xla():
    flat = random_weight((24, 40))
    x = normal(1, 3, 40)
    with pytest.raises(NotImplementedError, match="'native' does not serve"):
        matmul(x, flat)
    assert_product(q4jax.matmul_4bit(x, flat), x, flat.dequantize())


def test_the_table_decides(monkeypatch):
    monkeypatch.setattr(
        implementation, "_table", lambda: {q4jax.native.status().isa: {"linear": {"float32": 4}}}
    )
    native = IMPLEMENTATIONS["native"]
    assert native.is_preferred("linear", np.dtype("float32"), 4)
    assert not native.is_preferred("linear", np.dtype("float32"), 5)
    assert not native.is_preferred("linear", jnp.dtype("bfloat16"), 4)
