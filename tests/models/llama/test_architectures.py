"""Every architecture: transformers' logits and greedy tokens, and its directories in and out."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import q4jax
from q4jax.models import LlamaConfig, from_pretrained, generate, save_pretrained
from tests.support.random_weights import CASES, write_directory
from tests.support.vectors import GOLDEN

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """case -> (folder, model, vectors), each read once."""
    found = {}

    def load(case):
        if case not in found:
            folder = tmp_path_factory.mktemp(case)
            vectors = write_directory(case, folder)
            found[case] = folder, from_pretrained(folder), vectors
        return found[case]

    return load


def logits_of(model, vectors, forward):
    """float32 `[real tokens, vocab_size]`."""
    ids, mask = jnp.asarray(vectors["input_ids"]), jnp.asarray(vectors["attention_mask"])
    return np.asarray(forward(model, ids, attention_mask=mask))[vectors["attention_mask"] == 1]


@pytest.mark.parametrize("case", CASES)
def test_logits_of_transformers(case, loaded, forward, relative):
    _, model, vectors = loaded(case)
    expected = vectors["logits"][vectors["attention_mask"] == 1]
    assert relative(logits_of(model, vectors, forward), expected) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_transformers(case, loaded):
    _, model, vectors = loaded(case)
    new = vectors["tokens"].shape[1] - vectors["input_ids"].shape[1]
    mask = jnp.asarray(vectors["attention_mask"])
    tokens = generate(model, jnp.asarray(vectors["input_ids"]), new, attention_mask=mask)
    np.testing.assert_array_equal(tokens, vectors["tokens"])


def without(field, value=None):
    def change(config):
        return dataclasses.replace(config, **{field: value})

    return change


def ones(*names):
    def change(model):
        for module in (getattr(model.layers.self_attn, name) for name in names):
            module.scale[...] = jnp.ones_like(module.scale[...])

    return change


def zeros(*names):
    def change(model):
        for path in names:
            block, name = path.split(".")
            bias = getattr(getattr(model.layers, block), name).bias
            bias[...] = jnp.zeros_like(bias[...])

    return change


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama", without("rope_scaling")),
        ("llama", zeros("self_attn.o_proj")),
        ("llama", zeros("mlp.down_proj")),
        ("llama_linear_tied", without("rope_scaling")),
        ("llama_dynamic", without("rope_scaling")),
        ("mistral", without("sliding_window")),
        ("qwen2", without("rope_scaling")),
        ("qwen2", without("layer_types")),
        ("qwen2", zeros("self_attn.q_proj")),
        ("qwen2", zeros("self_attn.v_proj")),
        ("qwen3", without("rope_scaling")),
        ("qwen3", ones("q_norm")),
        ("qwen3", ones("k_norm")),
        ("mixtral", without("sliding_window")),
        ("qwen2_moe", without("layer_types")),
        ("qwen3_moe", without("sliding_window")),
    ],
)
def test_each_feature_is_in_force(case, change, loaded, forward, relative):
    """The vectors tell a model without the feature from one with it."""
    _, model, vectors = loaded(case)
    model = nnx.clone(model)
    if change.__qualname__.startswith("without"):
        model.config = change(model.config)
    else:
        change(model)
    expected = vectors["logits"][vectors["attention_mask"] == 1]
    assert relative(logits_of(model, vectors, forward), expected) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_written_directory_is_the_one_read(case, loaded, tmp_path):
    folder, model, _ = loaded(case)
    save_pretrained(model, tmp_path)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
    assert from_pretrained(tmp_path).config == model.config
    written, read = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    for key in ("architectures", "model_type", "sliding_window", "layer_types"):
        assert written.get(key) == (read.get(key) or None), key
    assert read["rope_parameters"].items() <= written["rope_parameters"].items()


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_quantized_and_routers_are_not(case, loaded, forward, relative, tmp_path):
    folder, model, vectors = loaded(case)
    settings = q4jax.QuantConfig(blocksize=32, compress_statistics=False, skip=())
    small = from_pretrained(folder, quantization=settings)
    config = model.config
    weight = small.layers.mlp.experts.up_proj.weight
    assert weight.quant_state.shape == (4, 5, config.experts.intermediate_size, 32)
    assert small.layers.mlp.gate.kernel.shape == (4, 32, 5)
    after = q4jax.quantize_model(model, settings)
    assert q4jax.fingerprint(small) == q4jax.fingerprint(after)
    dense = q4jax.dequantize_model(small)
    got = logits_of(small, vectors, forward)
    assert relative(got, logits_of(dense, vectors, forward)) < 1e-5
    assert relative(got, logits_of(model, vectors, forward)) > 1e-3

    save_pretrained(small, tmp_path)
    assert q4jax.fingerprint(from_pretrained(tmp_path)) == q4jax.fingerprint(small)


def test_experts_in_half_precision(loaded, relative):
    folder, model, vectors = loaded("qwen2_moe")
    half = from_pretrained(folder, dtype="float16")
    ids = jnp.asarray(vectors["input_ids"][:1])
    logits = half(ids)
    assert logits.dtype == jnp.float16
    assert relative(logits, model(ids)) < 1e-2


def test_a_router_that_is_quantized_is_decoded(loaded, forward, relative, tmp_path):
    """As bitsandbytes does to each linear layer of torch, Qwen2-MoE's shared gate among them."""
    folder, model, vectors = loaded("qwen2_moe")
    settings = {"quant_type": "nf4", "blocksize": 32, "compress_statistics": False}
    save_pretrained(from_pretrained(folder, q4jax.QuantConfig(**settings)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("shared_expert_gate.weight")]:
        weight = q4jax.Params4bit.quantize(jnp.asarray(tensors.pop(name)), **settings)
        tensors |= weight.state_dict(name)
    save_file(tensors, tmp_path / "model.safetensors")
    read = from_pretrained(tmp_path)
    gate = read.layers.mlp.shared_expert_gate.kernel[...]
    assert gate.shape == (4, 32, 1)
    dense = model.layers.mlp.shared_expert_gate.kernel[...]
    assert 0.01 < relative(gate, dense) < 0.2
    assert np.isfinite(logits_of(read, vectors, forward)).all()


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_compute_what_each_alone_would(case, loaded, relative):
    """Token by token and expert by expert, for loads from even to all on one expert."""
    _, model, _ = loaded(case)
    graphdef, state = nnx.split(model.layers.mlp)
    block = nnx.merge(graphdef, jax.tree.map(lambda a: a[1], state))
    router = block.gate.kernel[...]
    graph, experts = nnx.split(block.experts)

    @jax.jit
    def of_each(x):
        return jax.vmap(lambda expert: nnx.merge(graph, expert)(x))(experts)

    for tokens, even in ((1, True), (3, True), (64, True), (64, False), (400, True)):
        x = jax.random.normal(jax.random.key(tokens), (tokens, 32))
        block.gate.kernel[...] = router if even else router.at[:, 2].set(0).at[:, 2].add(x[0])
        chosen, weights = block.route(x)
        each, expected = np.asarray(of_each(x)), np.zeros(x.shape)
        for pick, weight in zip(np.asarray(chosen).T, np.asarray(weights).T, strict=True):
            expected += each[pick, np.arange(tokens)] * weight[:, None]
        if block.shared:
            expected += jax.nn.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
        assert relative(nnx.jit(lambda block, x: block(x))(block, x), expected) < 1e-5


@pytest.mark.slow
def test_gradients_reach_experts_and_routers(loaded):
    _, model, vectors = loaded("qwen3_moe")
    small = q4jax.quantize_model(model, blocksize=32, compress_statistics=False)
    adapted = q4jax.add_lora(small, rank=2, alpha=4.0, targets=("experts.up_proj",))
    lora = adapted.layers.mlp.experts.up_proj
    assert lora.lora_a.shape == (4, 5, 32, 2)
    ids = jnp.asarray(vectors["input_ids"])

    @nnx.jit
    def grads(model):
        wrt = nnx.DiffState(0, nnx.Any(nnx.LoRAParam, nnx.PathContains("gate")))
        return nnx.grad(lambda m: jax.nn.logsumexp(m(ids)), argnums=wrt)(model)

    found = nnx.to_pure_dict(grads(adapted))["layers"]["mlp"]
    assert (np.abs(found["gate"]["kernel"]).max(axis=(1, 2)) > 0).all()
    assert (np.abs(found["experts"]["up_proj"]["lora_b"]) > 0).any(axis=(1, 2, 3)).all()


BASE = json.loads((GOLDEN / "llama_tiny_bnb4" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gemma"}, NotImplementedError, "'gemma': .* llama, mistral, .* qwen3_moe"),
        ({"model_type": ["llama"]}, NotImplementedError, r"model_type \['llama'\]"),
        ({"model_type": "mistral", "sliding_window": -4}, ValueError, "sliding_window .* got -4"),
        (
            {"model_type": "mixtral", "num_local_experts": 1},
            ValueError,
            "_tok=2 is more than num_experts=1",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 8},
            ValueError,
            "contradicts itself: {'num_local_experts': 8, 'num_experts': 4}",
        ),
        ({"model_type": "qwen2_moe", "mlp_only_layers": [1]}, NotImplementedError, r"=\[1\]"),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": 2}, NotImplementedError, "step=2"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            None,
            None,
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]},
            ValueError,
            "layer_types must be 2 times .* 'chunked_attention'",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            ValueError,
            "but sliding_window is None",
        ),
        ({"num_hidden_layers": 2**31 - 1}, ValueError, "at most 10000, got 2147483647"),
        ({"hidden_size": 2, "head_dim": None}, ValueError, "head_dim=0 must be even"),
        ({"model_type": "qwen3", "use_sliding_window": 1}, ValueError, "must be true or false"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": "all"},
            ValueError,
            "max_window_layers must be an integer, got 'all'",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
            NotImplementedError,
            "layer_types=",
        ),
    ],
)
def test_configs_that_cannot_be_served_are_named(change, error, message):
    config = {k: v for k, v in BASE.items() if k != "quantization_config"} | change
    if error is None:
        assert LlamaConfig.from_hf(config).sliding_window is None
        return
    with pytest.raises(error, match=message):
        LlamaConfig.from_hf(config)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "llama",
            {"model_type": "mistral"},
            "of a mistral .* unexpected: .*down_proj.bias.* and 18 more",
        ),
        ("llama", {"attention_bias": False}, "of a llama .* unexpected: .*o_proj.bias"),
        ("llama", {"model_type": "qwen3"}, "of a qwen3 .* missing: .*k_norm.weight"),
        ("mixtral", {"num_local_experts": 6}, r"missing: .*experts.5.w1.weight"),
        ("mixtral", {"num_local_experts": 10**6}, "num_experts=1000000, but there are 91 tensors"),
        ("qwen3_moe", {"moe_intermediate_size": 25}, r"is \(32, 24\); .* \(32, 25\)"),
        ("mistral", {"num_key_value_heads": 4}, r"k_proj.weight is \(32, 32\); .* \(64, 32\)"),
    ],
)
def test_configs_that_contradict_the_weights_are_named(case, change, message, tmp_path):
    write_directory(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.compile(message)):
        from_pretrained(tmp_path)


def test_a_config_that_its_model_type_cannot_say_is_not_written(loaded, tmp_path):
    _, model, _ = loaded("qwen3")
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, model_type="llama")
    with pytest.raises(ValueError, match="model_type 'llama' cannot say .'qk_norm'."):
        save_pretrained(model, tmp_path)
