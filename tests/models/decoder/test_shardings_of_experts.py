"""Experts on a mesh: shardings and results."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import q4jax
from q4jax.models import Llama, LlamaConfig, LlamaShardings, save_pretrained
from q4jax.models.decoder.config import ExpertsConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    experts=ExpertsConfig(4, 2, 64, shared_intermediate_size=128),
    qkv_bias=True,
    model_type="qwen2_moe",
)
CODE = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
import q4jax
from q4jax.models import from_pretrained

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
forward = nnx.jit(lambda model, ids: model(ids))
ids = jnp.arange(24).reshape(2, 12) * 13 % 64
for settings in (None, q4jax.QuantConfig(blocksize=32, skip=())):
    one = from_pretrained(sys.argv[1], settings)
    model = from_pretrained(sys.argv[1], settings, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(one))
    up = model.layers.mlp.experts.up_proj
    leaf = up.kernel[...] if settings is None else up.weight.packed[...]
    assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    logits = np.asarray(forward(one, ids))
    error = np.abs(np.asarray(forward(model, ids)) - logits).max()
    assert error < 1e-5 * np.abs(logits).max(), error
print("done")
"""


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("experts.up_proj.weight.packed", (2, 4, 64, 32), (None, None, "tensor", "fsdp")),
        ("experts.down_proj.weight.absmax", (2, 4, 64, 2), (None, None, "fsdp", "tensor")),
        ("experts.up_proj.kernel", (2, 4, 64, 64), (None, None, "fsdp", "tensor")),
        ("experts.up_proj.weight.nested_absmax", (2, 4, 1), ()),
        ("shared_expert.down_proj.kernel", (2, 128, 64), (None, "tensor", "fsdp")),
        ("gate.kernel", (2, 64, 4), (None, None, None)),
        ("shared_expert_gate.kernel", (2, 64, 1), (None, None, None)),
    ],
)
def test_rules(name, shape, spec):
    mesh = Mesh(np.full((2, 2), jax.devices()[0]), ("fsdp", "tensor"))
    array = jax.ShapeDtypeStruct(shape, np.float32)
    assert LlamaShardings(mesh, blocksize=32)(f"layers.mlp.{name}", array).spec == PartitionSpec(
        *spec
    )


@pytest.mark.slow
@pytest.mark.heavy
def test_four_devices(tmp_path):
    save_pretrained(Llama(CONFIG, rngs=nnx.Rngs(2)), tmp_path)
    flags = "--xla_force_host_platform_device_count=4"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env["PYTHONPATH"] = str(Path(q4jax.__file__).parents[1])
    command = [sys.executable, "-c", CODE, tmp_path]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
