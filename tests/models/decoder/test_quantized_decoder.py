"""A 4-bit Llama with adapters under scan, remat, cache and generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.models import Llama, generate

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def dense(config):
    wide = dataclasses.replace(config, hidden_size=64, intermediate_size=128, head_dim=16)
    return Llama(wide, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def quantized(dense):
    return q4jax.quantize_model(dense)


@pytest.fixture(scope="module")
def adapted(quantized):
    model = q4jax.add_lora(quantized, rank=4, alpha=8.0)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "lora_b"):
            module.lora_b[...] = jax.random.normal(jax.random.key(5), module.lora_b.shape) * 0.1
    return model


def test_every_projection_is_quantized_and_nothing_else(dense):
    plan = q4jax.plan_quantization(dense)
    assert {d.path.rpartition(".")[2] for d in plan if d.quantize} == PROJECTIONS
    assert {d.path for d in plan if not d.quantize} == {"embed_tokens", "lm_head"}


def test_logits_are_those_of_the_dequantized_model(quantized, input_ids, forward, relative):
    dequantized = q4jax.dequantize_model(quantized)
    assert relative(forward(quantized, input_ids), forward(dequantized, input_ids)) < 1e-5


def test_adapters_merge_into_the_same_model(adapted, quantized, input_ids, forward, relative):
    logits = forward(adapted, input_ids)
    assert relative(logits, forward(quantized, input_ids)) > 1e-2
    assert relative(forward(q4jax.merge_lora(adapted), input_ids), logits) < 1e-5


def test_generation_equals_that_of_the_dequantized_model(adapted, input_ids):
    merged = q4jax.merge_lora(adapted)
    np.testing.assert_array_equal(generate(adapted, input_ids, 6), generate(merged, input_ids, 6))


def test_remat_gives_the_same_adapter_gradients(adapted, input_ids, relative):
    @nnx.jit
    def grads(model):
        adapters = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(lambda m: jax.nn.logsumexp(m(input_ids)), argnums=adapters)(model)

    plain = jax.tree.leaves(grads(adapted))
    adapted.remat = True
    remat = jax.tree.leaves(grads(adapted))
    adapted.remat = False
    assert len(plain) == 2 * len(PROJECTIONS)
    assert all(jnp.abs(leaf).max() > 0 for leaf in plain)
    assert max(map(relative, remat, plain)) < 1e-5
