"""The QLoRA step of a small Llama whose weights are split over several TPUs, by Explicit axes."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from collectives import collectives  # on the path by tests/conftest.py
from flax import nnx
from jax.sharding import AxisType

from q4jax.models import LlamaConfig, LlamaShardings
from tests.support.tpu.llama import qlora_model
from tests.support.tpu.targets import MISSING, compiled, mesh_of

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
# No part of the vocabulary or of the tokens is as many as a part of a width.
CONFIG = LlamaConfig(
    vocab_size=240,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=128,
)
ROWS, LENGTH = 24, 18
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))


def step_of(graph):
    def step(adapters, moments, rest, tokens):
        def loss(adapters):
            return nnx.merge(graph, adapters, rest).loss(tokens)

        value, gradients = jax.value_and_grad(loss)(adapters)
        updates, moments = OPTIMIZER.update(gradients, moments, adapters)
        return optax.apply_updates(adapters, updates), moments, value

    return jax.jit(step, donate_argnums=(0, 1))


@pytest.mark.parametrize(
    ("chip", "sizes"),
    [("v5e", {"fsdp": 4, "tensor": 2}), ("v6e", {"fsdp": 4})],
    ids=["v5e-8", "v6e-4"],
)
def test_a_step_moves_codes_and_scales(chip, sizes):
    mesh = mesh_of(chip, AxisType.Explicit, **sizes)
    rules = LlamaShardings(mesh)
    with jax.set_mesh(mesh):
        model = rules.place(nnx.eval_shape(functools.partial(qlora_model, CONFIG)))
        graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
        moments = jax.eval_shape(OPTIMIZER.init, adapters)
        tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=rules.batch)
        program = compiled(step_of(graph), adapters, moments, rest, tokens)
    moved = collectives(program.text)
    widths = {width // d for width in (256, 512) for d in (1, 2, 4, 8)}
    floats = [c for c in moved if c.is_float and len(c.shape) >= 2]
    assert not [c for c in floats if set(c.shape[-2:]) <= widths], "a float weight moves"
    codes = [c for c in moved if c.dtype == "u8" and c.kind == "all-gather"]
    assert max(c.size for c in codes) * sizes.get("tensor", 1) == 256 * 512 // 2
    assert program.temporary <= 12e6  # 11.1e6 on v5e when this was written


EXPERTS = LlamaConfig.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 240,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
    }
)


@pytest.fixture
def little_effort():
    """Of the compiler, which is done sooner."""
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", "UNKNOWN")


def test_experts_are_gathered_once_a_layer(little_effort):
    """And not for each block of tokens, though the number of its expert is not known."""
    mesh = mesh_of("v5e", AxisType.Explicit, expert=4)
    rules = LlamaShardings(mesh)
    with jax.set_mesh(mesh):
        model = rules.place(nnx.eval_shape(functools.partial(qlora_model, EXPERTS)))
        graph, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32, sharding=rules.batch)
        program = compiled(lambda s, ids: nnx.merge(graph, s).hidden_states(ids)[0], state, tokens)
    stacks = [c for c in collectives(program.text) if c.dtype == "u8" and 16 in c.shape[:2]]
    gathered = sorted((c.shape[-2:], c.times) for c in stacks if c.shape[-1] == 64)
    assert gathered == 3 * [((128, 64), 2)]
