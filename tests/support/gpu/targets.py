"""GPUs to compile for on a machine that has none."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

# Name, compute capability, multiprocessors, bytes of shared memory a block may have.
GPUS = {
    "sm_80": ("NVIDIA A100", 8, 0, 108, 166912),
    "sm_89": ("NVIDIA L4", 8, 9, 58, 101376),
    "sm_90": ("NVIDIA H200", 9, 0, 132, 232448),
    "sm_100": ("NVIDIA B200", 10, 0, 148, 232448),
    "sm_120": ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 12, 0, 188, 101376),
}
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_per_core} core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3000000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 80000000000 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 }} runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""


def mesh_of(gpu: str) -> jax.sharding.Mesh:
    """A mesh of one such GPU, to compile for."""
    kind, major, minor, cores, shared = GPUS[gpu]
    config = _CONFIG.format(
        kind=kind,
        major=major,
        minor=minor,
        cores=cores,
        shared=shared,
        shared_per_core=shared + 1024,
    )
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    return topologies.make_mesh(topology, (1,), ("device",))


def compile_for(mesh: jax.sharding.Mesh, function: Any, *args: Any, **options: Any) -> Any:
    """The program compiled for the mesh's GPU.

    Args:
      mesh: the GPU's.
      function: the program.
      *args: shapes and dtypes, or pytrees of them.
      **options: XLA's, for the compiler.
    """
    lowered = lower_for(mesh, function, *args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nothing_read_from_disk():
        return lowered.compile(options)


def lower_for(mesh: jax.sharding.Mesh, function: Any, *args: Any) -> Any:
    """The program before XLA compiles it."""
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


@contextlib.contextmanager
def nothing_read_from_disk() -> Iterator[None]:
    """JAX's persistent cache is off: a program for an absent device can be stored, never read."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once in a process whether the cache is in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
