"""`memory_report` of the variables of Linen models; that of NNX models is tested with them."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import q4jax
from q4jax.linen import merge_quantized, quantize_model, quantize_variables

X = jnp.ones((2, 64))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.Dense(128, name="up")(x)
        return nn.Dense(64, use_bias=False, name="down", param_dtype=jnp.bfloat16)(x)


@pytest.fixture(scope="module")
def variables():
    return Model().init(jax.random.key(0), X)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("nested", [False, True])
def test_boxes_are_counted_where_they_are(variables, nested):
    config = q4jax.QuantConfig(compress_statistics=nested)
    small = quantize_model(Model(), variables, X, config=config)
    report = q4jax.memory_report(small)
    assert report == q4jax.memory_report(merge_quantized(small))
    assert report == q4jax.memory_report(jax.eval_shape(lambda: small))
    assert report.quantized_weights == 2 * 64 * 128
    assert report.code_bytes == 64 * 128
    assert report.code_bytes + report.scale_bytes == nbytes(small["quant"])
    assert report.total_bytes == nbytes(small)
    assert report.original_bytes == 64 * 128 * (4 + 2)
    assert report.dense_bytes == nbytes(variables)
    assert report.other_bytes == {"batch_stats": 512, "norm": 512, "up": 512}
    assert report.trainable == 128 + 2 * 64
    assert report.other_weights == 128 + 4 * 64


def test_layers_of_q4jax_are_counted(variables):
    small = quantize_variables(variables, quant_type="nf4")
    assert q4jax.memory_report(small).total_bytes == nbytes(small)
    layer = q4jax.linen.LinearNF4(128).init(jax.random.key(0), X)
    assert q4jax.memory_report(layer).quantized_weights == 64 * 128
    split = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    boxed = nn.Dense(128, kernel_init=split).init(jax.random.key(0), X)
    report = q4jax.memory_report(quantize_variables(boxed))
    assert (report.quantized_weights, report.dense_bytes) == (64 * 128, nbytes(boxed))


def test_dense_variables_have_no_weight_in_4_bits(variables):
    report = q4jax.memory_report(variables)
    assert (report.quantized_weights, report.total_bytes) == (0, nbytes(variables))
    assert q4jax.memory_report({**variables, "step": {"count": 3}}) == report


def test_what_are_no_variables_is_refused(variables):
    with pytest.raises(ValueError, match="a dict 'params' or 'quant', got the keys .*norm"):
        q4jax.memory_report(variables["params"])
