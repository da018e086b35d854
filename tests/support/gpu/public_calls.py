"""Every public call compiled for a GPU that need not be there; prints its PTX instructions.

    python -m tests.support.gpu.public_calls sm_90

It prints JSON: a call's name -> an instruction with its modifiers -> how often, in all kernels of
its program.
"""

import collections
import functools
import importlib.util
import json
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import q4jax
from q4jax.ops.embedding import take_rows
from tests.support.gpu.compile_kernels import compile_for, mesh_of

N, K, M, BLOCKSIZE = 256, 1024, 8, 64
_INSTRUCTION = re.compile(r"^\s+(?:@!?%\w+ +)?\{? *([a-z][\w.:]*)[ ;]", re.M)

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def ptx(gpu: str, function: Callable[..., Any], *args: Any) -> str:
    """The PTX of a program's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compile_for(mesh_of(gpu), function, *args, **options)
        return "\n".join(path.read_text() for path in pathlib.Path(folder).glob("*.ptx"))


def instructions(text: str) -> collections.Counter[str]:
    """How often each instruction appears, also one that is written inline."""
    return collections.Counter(_INSTRUCTION.findall(text.replace(";", ";\n\t")))


def implementations(op: str) -> list[str | None]:
    """What serves an op on a GPU here."""
    names: list[str | None] = [None, "xla", "pallas"]
    if op == "matmul" and importlib.util.find_spec("jax_triton"):
        names.append("triton")
    return names


def calls() -> dict[str, Call]:
    """A call's name -> the call and its abstract arguments; "control" divides as XLA likes."""
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    found: dict[str, Call] = {"control": (lambda x: 1 / x + x / (x + 1), (x,))}
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            settings = (BLOCKSIZE, nested, quant_type)
            name = f"{quant_type}-{'nested' if nested else 'plain'}"
            found |= {f"{call}-{name}": value for call, value in _calls(*settings).items()}
    return found


def _calls(*settings: Any) -> dict[str, Call]:
    struct = jax.ShapeDtypeStruct
    w, x = struct((N, K), jnp.bfloat16), struct((M, K), jnp.bfloat16)
    bias, ids = struct((N,), jnp.float32), struct((M,), jnp.int32)
    ragged = struct((5, 77), jnp.float32)  # its last block is divided, not multiplied
    weight = jax.eval_shape(lambda w: q4jax.Params4bit.quantize(w, *settings), w)
    ragged_weight = jax.eval_shape(lambda w: q4jax.Params4bit.quantize(w, *settings), ragged)

    def quantize(w, implementation):
        packed, state = q4jax.quantize_4bit(w, *settings, implementation=implementation)
        return packed, state

    def gradients(x, weight, bias, implementation):
        def loss(x, bias):
            y = q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)
            return y.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, bias)

    def product(x, weight, bias, implementation):
        return q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)

    found: dict[str, Call] = {
        "quantize-ragged": (functools.partial(quantize, implementation=None), (ragged,)),
        "dequantize-ragged": (q4jax.dequantize_4bit, (ragged_weight,)),
        "take_rows": (take_rows, (weight, ids)),
        "take_rows-ragged": (take_rows, (ragged_weight, ids)),
    }
    ops: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "quantize": (quantize, (w,)),
        "dequantize": (q4jax.dequantize_4bit, (weight,)),
        "matmul": (product, (x, weight, bias)),
        "matmul-gradients": (gradients, (x, weight, bias)),
    }
    for op, (function, args) in ops.items():
        for implementation in implementations(op.partition("-")[0]):
            call = functools.partial(function, implementation=implementation)
            found[f"{op}-{implementation}"] = call, args
    return found


if __name__ == "__main__":
    warnings.simplefilter("error", DeprecationWarning)
    [gpu] = sys.argv[1:]
    report = {name: instructions(ptx(gpu, f, *args)) for name, (f, args) in calls().items()}
    json.dump(report, sys.stdout)
