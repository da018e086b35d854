"""Mixtures of experts: quantized, in half precision, with gradients, and one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import q4jax
from q4jax.models import from_pretrained, save_pretrained
from q4jax.models.decoder.routing import route
from tests.support.random_weights import logits_of

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_quantized_and_routers_are_not(case, loaded, forward, relative, tmp_path):
    folder, model, vectors = loaded(case)
    settings = q4jax.QuantConfig(blocksize=32, compress_statistics=False, skip=())
    small = from_pretrained(folder, quantization=settings)
    config = model.config
    for stack in small.stacks:
        mlp, layers = small.stack(stack.name).mlp, len(stack.numbers)
        weight = mlp.experts.up_proj.weight
        assert weight.quant_state.shape == (layers, 5, config.experts.intermediate_size, 32)
        assert mlp.gate.kernel.shape == (layers, 32, 5)
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
    first = model.stacks[0].name
    gate = read.stack(first).mlp.shared_expert_gate.kernel[...]
    dense = model.stack(first).mlp.shared_expert_gate.kernel[...]
    assert gate.shape == dense.shape
    assert 0.01 < relative(gate, dense) < 0.2
    assert np.isfinite(logits_of(read, vectors, forward)).all()


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_compute_what_each_alone_would(case, loaded, relative):
    """Token by token and expert by expert, for loads from even to all on one expert."""
    _, model, _ = loaded(case)
    graphdef, state = nnx.split(model.stack(model.stacks[-1].name).mlp)
    block = nnx.merge(graphdef, jax.tree.map(lambda a: a[-1], state))
    router = block.gate.kernel[...]
    graph, experts = nnx.split(block.experts)

    @jax.jit
    def of_each(x):
        return jax.vmap(lambda expert: nnx.merge(graph, expert)(x))(experts)

    for tokens, even in ((1, True), (3, True), (64, True), (64, False), (400, True)):
        x = jax.random.normal(jax.random.key(tokens), (tokens, 32))
        block.gate.kernel[...] = router if even else router.at[:, 2].set(0).at[:, 2].add(x[0])
        chosen, weights = route(block.spec, block.gate(x), None)
        each, expected = np.asarray(of_each(x)), np.zeros(x.shape)
        for pick, weight in zip(np.asarray(chosen).T, np.asarray(weights).T, strict=True):
            expected += each[pick, np.arange(tokens)] * weight[:, None]
        if block.spec.shared:
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
