"""Arguments by their names in other libraries: the error gives the name here."""

import inspect

import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.core.argument_names import NEEDLESS, OURS, name_ours
from q4jax.models import from_pretrained

W = jnp.ones((4, 64))
RNGS = nnx.Rngs(0)


def model():
    return q4jax.quantize_model(nnx.Linear(64, 32, rngs=RNGS))


CALLS = [
    (lambda: q4jax.Linear4bit(64, 32, bias=False, rngs=RNGS), "use_bias"),
    (lambda: q4jax.LinearNF4(64, 32, compute_dtype="bfloat16", rngs=RNGS), "dtype"),
    (lambda: q4jax.LinearGeneral4bit(64, (2, 16), bias=False, rngs=RNGS), "use_bias"),
    (lambda: q4jax.Einsum4bit("bd,df->bf", (64, 32), compute_dtype="f4", rngs=RNGS), "dtype"),
    (lambda: q4jax.EmbeddingNF4(8, embedding_dim=64, rngs=RNGS), "features"),
    (lambda: q4jax.linen.Linear4bit(32, bias=False), "use_bias"),
    (lambda: q4jax.linen.LinearNF4(32, compute_dtype="bfloat16"), "dtype"),
    (lambda: q4jax.linen.EmbeddingFP4(8, embedding_dim=64), "features"),
    (lambda: q4jax.quantize_4bit(W, bnb_4bit_quant_type="nf4"), "quant_type"),
    (lambda: q4jax.Params4bit.quantize(W, bnb_4bit_blocksize=64), "blocksize"),
    (lambda: q4jax.dequantize_4bit(W, quant_state=None), "state"),
    (lambda: q4jax.QuantConfig(bnb_4bit_compute_dtype="bfloat16"), "dtype"),
    (lambda: q4jax.QuantRule(bnb_4bit_use_double_quant=True), "compress_statistics"),
    (
        lambda: q4jax.quantize_model(nnx.Linear(64, 32, rngs=RNGS), llm_int8_skip_modules=["x"]),
        "skip",
    ),
    (lambda: q4jax.plan_quantization(model(), bnb_4bit_quant_type="nf4"), "quant_type"),
    (lambda: q4jax.add_lora(model(), r=8, alpha=16), "rank"),
    (lambda: q4jax.add_lora(model(), rank=8, lora_alpha=16), "alpha"),
    (lambda: q4jax.add_lora(model(), 8, 16, target_modules=["x"]), "targets"),
    (lambda: from_pretrained("nowhere", quantization_config=None), "quantization"),
]


@pytest.mark.parametrize(("call", "ours"), CALLS)
def test_the_error_gives_the_name_here(call, ours):
    with pytest.raises(TypeError, match=f"has no argument '.*'; here it is '{ours}'"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: q4jax.QuantConfig(load_in_4bit=True),
        lambda: q4jax.quantize_model(nnx.Linear(64, 32, rngs=RNGS), load_in_4bit=True),
        lambda: from_pretrained("nowhere", load_in_4bit=True),
        lambda: q4jax.Linear4bit(64, 32, device="cuda", rngs=RNGS),
        lambda: q4jax.quantize_4bit(W, quant_storage="uint8"),
    ],
)
def test_an_argument_without_counterpart_is_left_out(call):
    with pytest.raises(TypeError, match="has no argument '.*'; leave it out: "):
        call()


def test_own_names_and_unknown_ones_are_as_without():
    @name_ours
    def function(bias, *, dtype=None):
        return bias, dtype

    assert function(bias=1, dtype=2) == (1, 2)
    assert list(inspect.signature(function).parameters) == ["bias", "dtype"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        function(bias=1, other=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_alpha'"):
        function(bias=1, lora_alpha=2)  # nothing here is that


def test_a_name_is_in_one_table():
    assert not OURS.keys() & NEEDLESS.keys()


def test_all_linear_says_what_to_give():
    for targets in ("all-linear", ["all-linear"]):
        with pytest.raises(ValueError, match="leave targets out for every layer"):
            q4jax.add_lora(model(), 8, 16, targets=targets)
