"""Models on Explicit mesh axes compute what they compute on one device."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import q4jax
from q4jax.finetune import placement
from q4jax.finetune.optimizer import make_optimizer
from q4jax.finetune.settings import Settings
from q4jax.finetune.step import train_step
from q4jax.models import Llama, LlamaConfig, LlamaShardings, generate
from tests.support.meshes import EXPLICIT, mesh_of

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LATENT = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": [LINEAR, FULL],
    "shared_expert_intermediate_size": 64,
}
MODELS = {
    "llama": {"model_type": "llama"},
    "experts": {"model_type": "qwen3_moe", **EXPERTS},
    "windows": {
        "model_type": "gemma3_text",
        "sliding_window": 6,
        "layer_types": [SLIDING, FULL],
        "query_pre_attn_scalar": 16,
    },
    "latent": {"model_type": "deepseek_v3", **LATENT},
    "delta": {"model_type": "qwen3_next", **EXPERTS, **DELTA},
}
MESHES = {
    "llama": {"fsdp": 4, "tensor": 2},
    "experts": {"fsdp": 2, "expert": 2, "tensor": 2},
    "windows": {"data": 2, "fsdp": 2, "tensor": 2},
    "latent": {"fsdp": 2, "tensor": 4},
    "delta": {"fsdp": 2, "expert": 4},
}
IDS = np.random.default_rng(0).integers(0, 96, (4, 12), np.int32)
# Of the embedding too, whose table is the head of those that are tied.
SETTINGS = [q4jax.QuantRule(quant_type="nf4", blocksize=32, embeddings=True)]


def make(name, **adapters):
    """A model with adapters on one device."""
    model = Llama(LlamaConfig.from_hf({**SIZES, **MODELS[name]}), rngs=nnx.Rngs(1))
    model = q4jax.quantize_model(model, SETTINGS)
    model = q4jax.add_lora(model, 4, 8.0, rngs=nnx.Rngs(2), **adapters)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":  # zeros, which would hide the first factor
            variable[...] = jax.random.normal(jax.random.key(3), variable.shape) / 8
    return model


@nnx.jit
def everything(model, ids):
    """Logits, the loss of each token, and the gradient of their sum to the adapters."""

    def loss(model):
        hidden, _ = model.hidden_states(ids)
        each = model.losses(hidden, ids)
        return each.sum(), each

    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)
    return model(ids), gradient(model)


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    """Forward and backward, with layers that are computed again."""
    mesh = mesh_of(EXPLICIT, **MESHES[name])
    adapters = {"dora": True, "dropout": 0.25} if name == "llama" else {}
    one, rules = make(name, **adapters), LlamaShardings(mesh, blocksize=32)
    one.remat, one.attention = "layer", "blocks" if name == "windows" else None
    with jax.set_mesh(mesh):
        model = rules.place(nnx.clone(one))
        logits, rest = everything(model, jax.device_put(IDS, rules.batch))
    assert logits.sharding.is_equivalent_to(rules.batch, 3)
    close((logits, rest), everything(one, IDS))


def test_a_continuation():
    """Its cache has windows, and heads that "tensor" splits."""
    mesh = mesh_of(EXPLICIT, fsdp=2, tensor=2)
    one, rules = make("windows"), LlamaShardings(mesh, blocksize=32)
    settings = {"temperature": 0.7, "rng": jax.random.key(0)}
    with jax.set_mesh(mesh):
        text = generate(rules.place(nnx.clone(one)), IDS[:2], 4, **settings)
    np.testing.assert_array_equal(text, generate(one, IDS[:2], 4, **settings))


def test_a_step_of_finetune(monkeypatch):
    """As on TPUs, where the axes of its mesh are Explicit."""
    monkeypatch.setattr(placement, "_axis_type", lambda devices: EXPLICIT)
    settings = Settings(model="", steps=2, batch=8, accumulate=2, learning_rate=0.01)
    rows = {"inputs": IDS, "targets": np.roll(IDS, -1, 1), "weights": np.ones_like(IDS, "float32")}
    batch = {name: np.stack([array, array[::-1]]) for name, array in rows.items()}
    one, found = make("llama"), {}
    for mesh in (None, "fsdp=4,tensor=2"):
        place = placement.Placement(mesh, blocksize=32)
        with place.active():
            model = place.place(nnx.clone(one))
            optimizer = place.place(make_optimizer(model, settings))
            arrays = place.batch(batch, rows=1)
            found[mesh] = [train_step(model, optimizer, arrays, place) for _ in range(2)]
            if mesh is not None:
                b = model.layers.mlp.up_proj.lora_b[...]
                assert b.sharding.spec == P(None, None, "tensor")
    (first, second), sharded = found.values()
    assert second.loss < first.loss
    close(sharded, [first, second])


def test_outside_of_the_mesh():
    mesh = mesh_of(EXPLICIT, fsdp=8)
    with jax.set_mesh(mesh):
        model = LlamaShardings(mesh, blocksize=32).place(make("llama"))
    with pytest.raises(ValueError, match=r"axes \('fsdp',\) are Explicit.*jax.set_mesh"):
        model(IDS)
