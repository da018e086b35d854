"""Memory of a QLoRA step of Llama-3-8B on one device, 4,096 tokens, as compilers say it.

`scale.py --memory` prints it. Beside the step with losses and attention in blocks stands the one
that holds all logits and all scores. Compilers for accelerators keep 16-bit numbers; XLA's for CPUs
widens them to float32. The row for an H100 needs the extra `aot`, and no GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from scale_shapes import LLAMA_3_8B

import q4jax
from q4jax.models import Llama

LENGTH, RANK = 4096, 16
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3000000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 80000000000 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100"
"""


def whole_loss(model: Llama, tokens: jax.Array) -> jax.Array:
    """The loss by the logits of all tokens."""
    logits = model(tokens).astype(jnp.float32)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def step_of(blocks: bool) -> tuple[Any, Any, int]:
    """Return a step as a function of its state and tokens, the abstract state, and its weights."""

    def make() -> tuple[Llama, nnx.Optimizer]:
        dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        model = Llama(LLAMA_3_8B, remat="layer", rngs=nnx.Rngs(0), **dtypes)
        model.attention = "blocks" if blocks else "whole"
        model = q4jax.add_lora(q4jax.quantize_model(model), RANK, 2.0 * RANK)
        return model, nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)

    model, optimizer = nnx.eval_shape(make)
    graphdef, state = nnx.split((model, optimizer))
    _, _, frozen = nnx.split(model, nnx.LoRAParam, ...)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))

    def step(state: Any, tokens: jax.Array) -> Any:
        model, optimizer = nnx.merge(graphdef, state)
        loss = (lambda model: model.loss(tokens)) if blocks else (lambda m: whole_loss(m, tokens))
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), value

    return step, state, weights


def measure(blocks: bool, gpu: bool) -> dict[str, int]:
    """Return bytes: of the weights, and of everything else that the compiled step has."""
    step, state, weights = step_of(blocks)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    traced: Any = jax.jit(step, donate_argnums=0)
    if gpu:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=H100
        )
        mesh = topologies.make_mesh(topology, (1,), ("device",))
        place = NamedSharding(mesh, PartitionSpec())
        state, tokens = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (state, tokens)
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = traced.trace(state, tokens).lower(lowering_platforms=("cuda",))
            memory = lowered.compile().memory_analysis()
    else:
        memory = traced.lower(state, tokens).compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"weights": weights, "others": total - weights}


def show() -> None:
    """Print a row for each platform that can be compiled for, and each form."""
    jax.config.update("jax_enable_compilation_cache", False)
    for gpu in (False, True):
        name = "H100" if gpu else "CPU"
        for blocks in (False, True):
            try:
                found = measure(blocks, gpu)
            except Exception as error:  # the compiler of an absent platform
                print(f"{name}: not compiled: {str(error).splitlines()[0]}")
                break
            print(
                f"Llama-3-8B, {LENGTH} tokens, {name:>4}, {'blocks' if blocks else 'whole ':6}: "
                f"weights {found['weights'] / 1e9:.2f} GB, "
                f"everything else {found['others'] / 1e9:.2f} GB",
                flush=True,
            )
