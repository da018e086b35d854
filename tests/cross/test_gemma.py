"""The `gemma` package's transformer on 4-bit weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import q4jax
from q4jax.linen import merge_quantized, plan_quantization, quantize_model


@pytest.fixture(scope="module")
def model():
    from gemma.gm.nn import _config, _layers, _modules, _transformer

    q4jax.register_layer(_layers.Einsum, lambda module, eqn, x: {module.weight_name: eqn})
    q4jax.register_layer(
        _modules.Embedder,
        lambda m: {"input_embedding": q4jax.KernelAxes((m.vocab_size, m.embed_dim), inputs=(1,))},
    )
    kinds = (_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL)
    config = _config.TransformerConfig(
        num_embed=96,
        embed_dim=64,
        hidden_dim=128,
        num_heads=4,
        head_dim=32,
        num_kv_heads=2,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=kinds,
        sliding_window_size=4,
        use_qk_norm=True,
        transpose_gating_einsum=True,
    )
    return _transformer.Transformer(config=config, dtype=jnp.float32, tokens="batch.tokens")


def test_a_transformer_of_gemma_runs_on_4_bit_weights(model):
    tokens = jnp.array([[2, 5, 7, 11, 13, 17]])
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    plan = plan_quantization(model, variables, tokens)
    assert plan.kept == []
    assert len(plan) == 1 + 2 * 4
    small = quantize_model(model, variables, tokens)
    assert all(leaf.ndim == 1 for leaf in jax.tree.leaves(small["params"]))
    placed = merge_quantized(small)

    def logits(variables):
        return model.apply(variables, tokens).logits

    dense = nn.unbox(placed)
    np.testing.assert_array_equal(jax.jit(logits)(placed), jax.jit(logits)(dense))
    assert not np.array_equal(logits(placed), logits(variables))

    def loss(params):
        return jnp.mean(logits(merge_quantized({**small, "params": params})) ** 2)

    grads = jax.jit(jax.grad(loss))(small["params"])
    assert jax.tree.structure(grads) == jax.tree.structure(small["params"])
