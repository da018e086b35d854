"""The model: Hugging Face's numbers, causality, grouped heads, cache and scan."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from q4jax.models import Llama, LlamaConfig, from_state_dict
from q4jax.models.decoder.kv_cache import KVCache
from tests.support.optimizations import optimizations

GOLDEN = Path(__file__).parents[2] / "golden" / "llama_tiny_bnb4"


def dequantized(tensors):
    """Hugging Face's 4-bit tensors by the published rule: two levels of code * absmax."""
    dense = {}
    for name, value in tensors.items():
        if name + ".absmax" in tensors:
            (key,) = [k for k in tensors if k.startswith(name + ".quant_state.")]
            info = json.loads(tensors[key].tobytes())
            scale = tensors[name + ".nested_quant_map"][tensors[name + ".absmax"]]
            scale = scale * np.repeat(tensors[name + ".nested_absmax"], 256)[: scale.size]
            scale = scale + np.float32(info["nested_offset"])
            codes = np.stack([value >> 4, value & 15], axis=-1).reshape(-1)
            weight = tensors[name + ".quant_map"][codes] * np.repeat(scale, info["blocksize"])
            dense[name] = weight.reshape(info["shape"])
        elif ".weight." not in name:
            dense[name] = value
    return dense


def test_logits_of_transformers(relative):
    expected = load_file(GOLDEN / "expected.safetensors")
    config = LlamaConfig.from_hf(json.loads((GOLDEN / "config.json").read_text()))
    model = from_state_dict(config, dequantized(load_file(GOLDEN / "model.safetensors")))
    logits = model(jnp.asarray(expected["input_ids"], jnp.int32))
    assert relative(logits, expected["logits_dequantized_model"]) <= 1e-5


def test_shapes_names_and_dtypes(model, config, input_ids, forward):
    assert forward(model, input_ids).shape == (2, 11, config.vocab_size)
    state = nnx.to_pure_dict(nnx.state(model))
    assert state["layers"]["self_attn"]["k_proj"]["kernel"].shape == (3, 32, 16)
    assert state["layers"]["mlp"]["down_proj"]["kernel"].shape == (3, 48, 32)
    assert state["embed_tokens"]["embedding"].shape == (97, 32)
    assert state["lm_head"]["kernel"].shape == (32, 97)
    kernels = state["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])


def test_compute_dtype_and_float32_norms(config, input_ids, forward):
    half = Llama(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    assert forward(half, input_ids).dtype == jnp.bfloat16
    assert half.layers.mlp.up_proj.kernel.dtype == jnp.bfloat16
    assert half.norm.scale.dtype == half.layers.input_layernorm.scale.dtype == jnp.float32
    full = Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    assert forward(full, input_ids).dtype == jnp.bfloat16
    assert full.layers.mlp.up_proj.kernel.dtype == jnp.float32


def test_biases_where_the_config_asks(config):
    model = Llama(dataclasses.replace(config, attention_bias=True, mlp_bias=True), rngs=nnx.Rngs(0))
    assert model.layers.self_attn.o_proj.bias.shape == (3, 32)
    assert model.layers.mlp.up_proj.bias.shape == (3, 48)
    assert model.lm_head.bias is None


def test_tied_embeddings_are_the_head(config, input_ids, forward):
    model = Llama(dataclasses.replace(config, tie_word_embeddings=True), rngs=nnx.Rngs(0))
    assert not hasattr(model, "lm_head")
    hidden, _ = model.hidden_states(input_ids)
    np.testing.assert_allclose(
        forward(model, input_ids),
        hidden @ model.embed_tokens.embedding[...].T,
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_future_does_not_change_the_past(model, input_ids, config, forward):
    changed = input_ids.at[:, 6:].set((input_ids[:, 6:] + 1) % config.vocab_size)
    before, after = forward(model, input_ids), forward(model, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_rest(model, input_ids, side, relative, forward):
    pad = jnp.zeros((2, 4), input_ids.dtype)
    real, none = jnp.ones(input_ids.shape, int), jnp.zeros(pad.shape, int)
    parts = [(pad, none), (input_ids, real)]
    ids, mask = (
        jnp.concatenate(x, axis=1) for x in zip(*parts[:: 1 if side == "left" else -1], strict=True)
    )
    logits = forward(model, ids, attention_mask=mask)
    assert np.isfinite(logits).all()
    logits = logits[:, 4:] if side == "left" else logits[:, :-4]
    assert relative(logits, forward(model, input_ids)) < 2e-6


def test_only_differences_of_positions_count(model, input_ids, relative, forward):
    shifted = jnp.broadcast_to(jnp.arange(11) + 20, input_ids.shape)
    assert relative(forward(model, input_ids, positions=shifted), forward(model, input_ids)) < 1e-5
    stretched = jnp.broadcast_to(jnp.arange(11) * 2, input_ids.shape)
    assert (
        relative(forward(model, input_ids, positions=stretched), forward(model, input_ids)) > 1e-3
    )


def test_grouped_heads_equal_repeated_heads(model, config, input_ids, relative, forward):
    repeated = Llama(dataclasses.replace(config, num_key_value_heads=4), rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    for name in ("k_proj", "v_proj"):
        kernel = state["layers"]["self_attn"][name]["kernel"].reshape(3, 32, 2, 8)
        kernel = jnp.repeat(kernel, 2, axis=2).reshape(3, 32, 32)
        state["layers"]["self_attn"][name]["kernel"] = kernel
    wide = nnx.state(repeated)
    nnx.replace_by_pure_dict(wide, state)
    nnx.update(repeated, wide)
    assert relative(forward(repeated, input_ids), forward(model, input_ids)) < 2e-6


@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 6]])
def test_cache_equals_full_forward(model, config, input_ids, chunks, relative, forward):
    @nnx.jit
    def step(model, ids, cache):
        hidden, cache = model.hidden_states(ids, cache=cache)
        return model.logits(hidden), cache

    cache = KVCache.empty(model.stacks, batch=2, capacity=16, dtype=jnp.float32)
    parts, start = [], 0
    for width in chunks:
        ids = input_ids[:, start : start + width]
        logits, cache = step(model, ids, cache)
        parts.append(logits)
        start += width
    assert int(cache.length) == 11
    assert relative(jnp.concatenate(parts, axis=1), forward(model, input_ids)) < 2e-6


@nnx.jit
def gradients(model, input_ids):
    return nnx.grad(lambda model: jnp.sum(jax.nn.log_softmax(model(input_ids))[..., 0]))(model)


def test_remat_changes_memory_and_not_gradients(config, input_ids, relative):
    plain = Llama(config, rngs=nnx.Rngs(1))
    remat = Llama(config, remat=True, rngs=nnx.Rngs(1))
    pairs = zip(*(jax.tree.leaves(gradients(m, input_ids)) for m in (plain, remat)), strict=True)
    assert all(relative(a, b) < 1e-5 for a, b in pairs)

    ids = jnp.tile(input_ids, (4, 5))
    with optimizations(few=False):
        plain_bytes, remat_bytes = (
            gradients.lower(m, ids).compile().memory_analysis().temp_size_in_bytes
            for m in (plain, remat)
        )
    assert remat_bytes < plain_bytes


class Frozen(nnx.Variable):
    """A variable that is no parameter."""


def test_scan_carries_every_type_of_variable(config, input_ids):
    """A projection may be replaced by a module with other variables, integers among them."""

    class Coded(nnx.Module):
        def __init__(self, linear):
            self.codes = Frozen(jnp.round(linear.kernel[...] * 50).astype(jnp.int8))
            self.delta = nnx.LoRAParam(jnp.zeros(linear.kernel.shape))

        def __call__(self, x):
            return x @ (self.codes[...].astype(x.dtype) / 50 + self.delta[...])

    model = Llama(config, remat=True, rngs=nnx.Rngs(1))
    model.layers.mlp.up_proj = Coded(model.layers.mlp.up_proj)
    diff = nnx.DiffState(0, nnx.LoRAParam)

    @nnx.jit
    def grads(model):
        return nnx.grad(lambda m: m(input_ids).std(), argnums=diff)(model)

    (delta,) = jax.tree.leaves(grads(model))
    assert delta.shape == (3, 32, 48)
    assert (np.abs(delta).max(axis=(1, 2)) > 0).all()
    assert model.layers.mlp.up_proj.codes.dtype == jnp.int8


@pytest.mark.parametrize("bad", [jnp.zeros((3,), int), jnp.zeros((1, 3))])
def test_input_ids_are_checked(model, bad):
    with pytest.raises(ValueError, match="input_ids must be int"):
        model(bad)
