"""Compiles the kernels for a GPU that need not be there; prints what came out, as JSON.

    python -m tests.support.gpu.compile_kernels sm_90
    python -m tests.support.gpu.compile_kernels sm_90 --loop CELL    # the machine code of its loop

Needs the extra `aot`, and a process of its own: the flags count only before jax starts.
"""

import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
os.environ["XLA_FLAGS"] = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"

import dataclasses
import functools
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import q4jax
from tests.support.gpu import cubin
from tests.support.gpu.cells import CELLS, Cell

# Name, compute capability, multiprocessors, bytes of shared memory a block may have.
GPUS = {
    "sm_80": ("NVIDIA A100", 8, 0, 108, 166912),
    "sm_89": ("NVIDIA L4", 8, 9, 58, 101376),
    "sm_90": ("NVIDIA H200", 9, 0, 132, 232448),
    "sm_100": ("NVIDIA B200", 10, 0, 148, 232448),
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


def compile_for(mesh: jax.sharding.Mesh, function: Any, *args: Any) -> Any:
    """The program compiled for the mesh's GPU; `args` are shapes and dtypes, or pytrees of them."""
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compile()


def program(cell: Cell) -> tuple[Any, tuple[Any, ...]]:
    """The public call of a cell, and its abstract arguments."""
    implementation = {"implementation": "pallas"}
    w = jax.ShapeDtypeStruct((cell.n, cell.k), cell.dtype)
    settings = (cell.blocksize, cell.nested, cell.quant_type)
    if cell.operation == "quantize":

        def quantize(w):
            packed, state = q4jax.quantize_4bit(w, *settings, **implementation)
            return packed, state.absmax

        return quantize, (w,)
    weight = jax.eval_shape(lambda w: q4jax.Params4bit.quantize(w, *settings), w)
    if cell.operation == "dequantize":
        return functools.partial(q4jax.dequantize_4bit, **implementation), (weight,)
    x = jax.ShapeDtypeStruct((cell.m, cell.k), cell.dtype)
    linear = functools.partial(q4jax.matmul_4bit, **implementation)
    if cell.operation == "linear":
        bias = jax.ShapeDtypeStruct((cell.n,), cell.dtype)
        return lambda x, weight, bias: linear(x, weight, bias=bias), (x, weight, bias)

    def transposed(g, weight):
        x = jnp.zeros((cell.m, cell.k), cell.dtype)
        return jax.vjp(lambda x: linear(x, weight), x)[1](g)

    return transposed, (jax.ShapeDtypeStruct((cell.m, cell.n), cell.dtype), weight)


def report(gpu: str, cells: list[Cell]) -> dict[str, Any]:
    """Cell -> kernel -> what `cubin.Kernel` holds, or the error."""
    mesh = mesh_of(gpu)
    results: dict[str, Any] = {}
    for cell in cells:
        function, args = program(cell)
        try:
            found = cubin.kernels(compile_for(mesh, function, *args))
            results[cell.name] = {k: dataclasses.asdict(v) for k, v in found.items()}
        except Exception as error:
            results[cell.name] = {"error": f"{type(error).__name__}: {error}"}
    return results


def listing(gpu: str, name: str) -> str:
    """The longest loop of each kernel of a cell, in SASS."""
    [cell] = [cell for cell in CELLS if cell.name == name]
    function, args = program(cell)
    loops = cubin.loops(compile_for(mesh_of(gpu), function, *args))
    return "\n".join(f"{kernel}:\n" + "\n".join(lines) for kernel, lines in loops.items() if lines)


if __name__ == "__main__":
    warnings.simplefilter("error", DeprecationWarning)
    gpu, *names = sys.argv[1:]
    if names[:1] == ["--loop"]:
        print(listing(gpu, *names[1:]))
    else:
        chosen = [cell for cell in CELLS if not names or cell.name in names]
        json.dump(report(gpu, chosen), sys.stdout)
