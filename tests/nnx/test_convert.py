"""quantize_model, dequantize_model, the plan and the memory report."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import q4jax

X = jax.random.normal(jax.random.key(1), (2, 64))


class Mixed(nnx.Module):
    """A layer in every kind of place."""

    def __init__(self, rngs):
        def layer():
            return nnx.Linear(64, 64, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(64, 64, rngs=rngs)

        self.list = nnx.List([layer()])
        self.dict = nnx.Dict(a=layer())
        self.tree = nnx.data((layer(), {"z": [layer()]}))
        self.shared = self.dict["a"]
        self.stack = make(rngs)
        self.embed = nnx.Embed(8, 64, rngs=rngs)
        self.lm_head = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        x = self.list[0](x) + self.dict["a"](x) + self.shared(x)
        x = x + self.tree[0](x) + self.tree[1]["z"][0](x)
        return self.lm_head(run(self.stack, x))


PLACES = ["dict.a", "list.0", "stack", "tree.0", "tree.1.z.0"]


@pytest.fixture(scope="module")
def model():
    return Mixed(nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(model):
    return q4jax.quantize_model(model)


def test_every_place_is_reached(quantized):
    plan = {d.path: d for d in q4jax.plan_quantization(Mixed(nnx.Rngs(0)))}
    assert sorted(path for path, d in plan.items() if d.quantize) == PLACES
    assert plan["lm_head"].reason == "skip has 'lm_head'"
    assert plan["embed"].reason == "an embedding; QuantRule(embeddings=True) takes it"
    layers = [quantized.dict["a"], quantized.list[0], quantized.stack, *quantized.tree[:1]]
    assert {type(layer) for layer in layers} == {q4jax.Linear4bit}
    assert type(quantized.tree[1]["z"][0]) is q4jax.Linear4bit
    assert type(quantized.lm_head) is nnx.Linear


def test_a_shared_module_stays_shared(quantized):
    assert quantized.shared is quantized.dict["a"]


def test_a_kernel_that_two_layers_share_stays_shared():
    model = nnx.Dict(
        a=nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
        b=nnx.Linear(64, 64, rngs=nnx.Rngs(1)),
        c=nnx.Linear(64, 64, rngs=nnx.Rngs(2)),
    )
    model.b.kernel = model.a.kernel
    small = q4jax.quantize_model(model)
    assert small.a.weight is small.b.weight and small.c.weight is not small.a.weight
    assert q4jax.memory_report(small).quantized_weights == 2 * 64 * 64
    assert small.a.bias is not small.b.bias
    merged = nnx.merge(*nnx.split(small))
    np.testing.assert_array_equal(merged.b(X) - merged.b.bias, small.a(X) - small.a.bias)


def test_the_model_given_is_left_as_it_was(model, quantized):
    assert type(model.list[0]) is nnx.Linear
    assert quantized.lm_head.kernel[...] is model.lm_head.kernel[...]


def test_values_are_those_of_the_dequantized_model(quantized):
    dense = q4jax.dequantize_model(quantized)
    assert type(dense.stack) is nnx.Linear
    np.testing.assert_allclose(quantized(X), dense(X), rtol=0, atol=1e-5)


def test_stacked_kernels_become_stacked_weights(model, quantized):
    state = quantized.stack.weight.quant_state
    assert state.shape == (3, 64, 64)
    assert state.offset.shape == (3,)
    first = q4jax.Params4bit.quantize(
        model.stack.kernel[...][0].T, quant_type="nf4", compress_statistics=True
    )
    assert np.array_equal(quantized.stack.weight.packed[0], first.packed)


def test_a_bare_linear_and_overrides():
    layer = q4jax.quantize_model(
        nnx.Linear(64, 32, rngs=nnx.Rngs(0)), quant_type="fp4", blocksize=32, dtype=jnp.bfloat16
    )
    assert layer.weight.quant_state.spec.tag() == "fp4_b32_n256_float32_32x64"
    assert layer(X).dtype == jnp.bfloat16


@pytest.mark.parametrize("skip", ["dict", "a", "dict.a"])
def test_skip_by_name_or_path(model, skip):
    plan = {d.path: d for d in q4jax.plan_quantization(model, skip=(skip,))}
    assert not plan["dict.a"].quantize
    assert plan["list.0"].quantize and plan["lm_head"].quantize


def test_nothing_matched_says_what_there_was(model):
    with pytest.raises(ValueError, match=r"matched no layer.*list\.0 \(Linear\): kept: skip has"):
        q4jax.quantize_model(model, skip=("list", "dict", "tree", "stack", "lm_head"))
    with pytest.raises(ValueError, match="no layer with a weight"):
        q4jax.quantize_model(nnx.Dropout(0.1))


def test_twice_is_refused(quantized):
    with pytest.raises(ValueError, match=r"quantized already: dict\.a, list\.0"):
        q4jax.quantize_model(quantized)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="must be an nnx.Module, got dict"):
        q4jax.quantize_model({"kernel": X})
    with pytest.raises(TypeError, match="must be an nnx.Module, got dict"):
        q4jax.dequantize_model({"kernel": X})
    with pytest.raises(TypeError, match="got Dense; a Linen model is quantized by q4jax.linen"):
        q4jax.quantize_model(linen.Dense(4))
    with pytest.raises(TypeError, match="bits"):
        q4jax.quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), bits=4)
    with pytest.raises(ValueError, match="nothing in the model is quantized"):
        q4jax.dequantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(value):
    model = Mixed(nnx.Rngs(0))
    model.stack.kernel[...] = model.stack.kernel[...].at[1, 2, 3].set(value)
    with pytest.raises(ValueError, match=r"stack\.kernel: .*NaN or inf \(1 of 12288"):
        q4jax.quantize_model(model)


def test_a_linear_layer_that_is_not_served_is_a_warning():
    odd = nnx.LinearGeneral(64, (2, 2), dot_general=lambda *a, **k: None, rngs=nnx.Rngs(0))
    model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), odd)
    with pytest.warns(UserWarning, match=r"layers\.1 \(LinearGeneral\): kept: its dot_general was"):
        q4jax.quantize_model(model)


def test_the_report_is_logged(model, caplog):
    with caplog.at_level(logging.INFO, logger="q4jax"):
        q4jax.quantize_model(model)
    assert "lm_head (Linear): kept: skip has 'lm_head'" in caplog.text
    assert "stack (Linear): quantized" in caplog.text


def test_embeddings_dequantize():
    embed = q4jax.EmbeddingNF4(20, 64, rngs=nnx.Rngs(0))
    dense = q4jax.dequantize_model(embed)
    assert type(dense) is nnx.Embed
    assert np.array_equal(dense(jnp.arange(20)), embed(jnp.arange(20)))


@pytest.mark.parametrize(("nested", "limit"), [(True, 4.13), (False, 4.51)])
def test_bits_per_weight(nested, limit):
    model = q4jax.quantize_model(
        nnx.Linear(1024, 512, rngs=nnx.Rngs(0)), compress_statistics=nested
    )
    report = q4jax.memory_report(model)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert report.total_bytes == stored
    assert report.bits_per_weight == 8 * (stored - 512 * 4) / (1024 * 512)
    assert 4.1 < report.bits_per_weight <= limit
    assert report.original_bytes == 4 * 1024 * 512
    assert report.dense_bytes == 4 * 1024 * 512 + 4 * 512


def test_report_counts_shared_weights_once_and_prints(quantized):
    report = q4jax.memory_report(quantized)
    assert report.quantized_weights == 7 * 64 * 64
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(quantized)))
    assert report.total_bytes == stored
    text = str(report)
    assert "28,672 of " in text and "full precision: lm_head" in text
    abstract = nnx.eval_shape(lambda: q4jax.LinearNF4(64, 64, rngs=nnx.Rngs(0)))
    assert q4jax.memory_report(abstract).quantized_weights == 64 * 64
    with pytest.raises(TypeError, match="nnx.Module or a dict of Linen variables, got int"):
        q4jax.memory_report(3)


BNB = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def test_config_from_bitsandbytes():
    expected = q4jax.QuantConfig("nf4", 64, True, jnp.dtype("bfloat16"), ("lm_head",))
    assert q4jax.QuantConfig.from_bnb_config(BNB) == expected
    kept = q4jax.QuantConfig.from_bnb_config(BNB | {"llm_int8_skip_modules": ["a", "b"]})
    assert kept.skip == ("a", "b")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"load_in_8bit": True}, "only load_in_4bit=True"),
        ({"load_in_4bit": False}, "only load_in_4bit=True"),
        ({"quant_method": "gptq"}, "quant_method must be 'bitsandbytes', got 'gptq'"),
        ({"bnb_4bit_quant_type": "int4"}, "quant_type must be 'nf4' or 'fp4', got 'int4'"),
        ({"bnb_4bit_compute_dtype": "int8"}, "dtype must be float32, float16 or bfloat16"),
        ({"bits": 4}, r"unknown keys .*\['bits'\]"),
    ],
)
def test_config_from_bitsandbytes_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        q4jax.QuantConfig.from_bnb_config(BNB | change)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quant_type": "nf5"}, "got 'nf5'"),
        ({"blocksize": 100}, "invalid blocksize 100"),
        ({"dtype": jnp.int32}, "got int32"),
        ({"skip": "lm_head"}, "tuple of names, got 'lm_head'"),
    ],
)
def test_config_refuses(settings, match):
    with pytest.raises(ValueError, match=match):
        q4jax.QuantConfig(**settings)
