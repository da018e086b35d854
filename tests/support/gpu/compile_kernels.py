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

import q4jax
from q4jax.ops.weight_of_stack import WeightOfStack
from tests.support.gpu import cubin
from tests.support.gpu.cells import CELLS, Cell
from tests.support.gpu.targets import compile_for, mesh_of


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
    if cell.layers:
        weight = _layer_of(weight, cell.layers)
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


def _layer_of(weight: Any, layers: int) -> WeightOfStack:
    """Such a weight in a stack, abstract as it is."""

    def stacked(array: Any) -> Any:
        return jax.ShapeDtypeStruct((layers, *array.shape), array.dtype)

    return WeightOfStack(jax.tree.map(stacked, weight), (jax.ShapeDtypeStruct((), jnp.int32),))


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
