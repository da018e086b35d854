"""QLoRA on meshes: the losses of one device, untouched codes, and only bytes gathered."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import q4jax
from q4jax.models import Llama, LlamaConfig, LlamaShardings
from q4jax.nnx.variables import Frozen4bit
from tests.support.meshes import AUTO, EXPLICIT, mesh_of

# Every axis of the meshes divides every width, also counted in blocks of 32. No part of the
# vocabulary or of the 336 tokens is as many as a part of a width.
CONFIG = LlamaConfig(
    vocab_size=240,
    hidden_size=384,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=12,
    num_key_value_heads=6,
    head_dim=32,
)
MESHES = [
    {"fsdp": 8},
    {"tensor": 8},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 8},
    {"fsdp": 3},
    {"tensor": 3},
    {"fsdp": 2, "tensor": 3},
    {"data": 2, "tensor": 4},
]
CASES = [(AUTO, sizes) for sizes in MESHES] + [(EXPLICIT, MESHES[n]) for n in (2, 4)]
TOKENS = np.random.default_rng(0).integers(0, 240, (2, 24, 15), np.int32)
STEPS = 20


def rules_of(mesh):
    return LlamaShardings(mesh, blocksize=32)


def make(mesh=None):
    """The model with adapters, and the optimizer of these, on the mesh."""
    model = Llama(CONFIG, rngs=nnx.Rngs(1))
    if mesh is not None:
        rules_of(mesh).place(model)
    model = q4jax.quantize_model(model, blocksize=32)
    model = q4jax.add_lora(model, 4, 16.0, rngs=nnx.Rngs(2))
    model.remat = True
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    if mesh is not None:
        rules_of(mesh).place(model)
        rules_of(mesh).place(optimizer)
    return model, optimizer


@nnx.jit(static_argnames="rules")
def step(model, optimizer, tokens, rules=None):
    def loss(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    if rules is not None:
        rules.place(model, nnx.LoRAParam)
        rules.place(optimizer)
    return value


def place(tokens, mesh=None):
    """A batch, the same in every process, over the axes that split batches."""
    if mesh is None:
        return jnp.asarray(tokens)
    axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
    sharding = NamedSharding(mesh, PartitionSpec(axes or None))
    return jax.make_array_from_callback(tokens.shape, sharding, lambda part: tokens[part])


def train(model, optimizer, mesh=None):
    """The losses of all steps, and the program of a step: one, so that nothing moves in between."""
    batches = [place(tokens, mesh) for tokens in TOKENS]
    rules = None if mesh is None else rules_of(mesh)
    program = step.lower(model, optimizer, batches[0], rules=rules).compile()
    losses = [float(program(model, optimizer, batches[n % len(TOKENS)])) for n in range(STEPS)]
    return losses, program


@pytest.fixture(scope="module")
def alone():
    """The losses of one device, and the codes before training."""
    model, optimizer = make()
    digest = q4jax.fingerprint(model)
    losses, _ = train(model, optimizer)
    assert losses[-1] < losses[0] - 0.1, "it does not learn"
    return losses, digest


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=str)
def test_losses_are_those_of_one_device(kind, sizes, alone):
    from collectives import collectives  # on pytest's path, and not on that of worker.py

    losses, digest = alone
    mesh = mesh_of(kind, **sizes)
    with jax.set_mesh(mesh) if kind == EXPLICIT else contextlib.nullcontext():
        model, optimizer = make(mesh)
        found, program = train(model, optimizer, mesh)
    assert q4jax.fingerprint(model) == digest, "quantized on the mesh, bit for bit"
    packed = model.layers.mlp.down_proj.base.weight.packed[...]
    split = int(np.prod([sizes.get(axis, 1) for axis in ("fsdp", "tensor")]))
    assert packed.addressable_shards[0].data.size * split == packed.size
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-4)
    for variable in jax.tree.leaves(nnx.state(model, Frozen4bit)):
        assert variable.sharding.mesh == mesh, "still where it was"

    moved = collectives(program.as_text())
    widths = (CONFIG.hidden_size, CONFIG.intermediate_size, 6 * 32)
    parts = {width // d for width in widths for d in (1, 2, 3, 4, 6, 8)}
    weights = [c for c in moved if c.is_float and set(c.shape[-2:]) <= parts]
    assert not [c for c in weights if len(c.shape) >= 2], "a float weight moves"
    gathers = [c for c in moved if c.kind == "all-gather" and c.dtype == "u8"]
    assert bool(gathers) == ("fsdp" in sizes)
