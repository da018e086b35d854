"""Programs compiled for TPUs that are not here, and what the compiler wrote of them.

The compiler dumps its final code, in bundles of instructions that start together, only where a
variable of the environment tells it to before it is loaded. Therefore they are compiled in a
process of their own: `python -m tests.support.compiled_for_tpu JOBS FOLDER` prints a JSON list.
"""

import dataclasses
import glob
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WITHOUT_A_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program: "linear", "gradient", "dequantize", "quantize", "scan" over a stack, or "None".

    Attributes:
      program: which.
      chip: a key of `TOPOLOGIES`.
      m: rows of the activation.
      n: output features.
      k: input features.
      dtype: of the activation or the weight.
      blocksize: of the weight.
      nested: whether its scales are.
      placed: whether its arrays lie as the kernels read them.
    """

    program: str
    chip: str
    m: int = 8
    n: int = 4096
    k: int = 4096
    dtype: str = "bfloat16"
    blocksize: int = 64
    nested: bool = False
    placed: bool = True


def missing():
    """Why nothing can be compiled for TPUs here, or None."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed"


def compile_all(jobs):
    """{job: what its program is, or {"error": the first line}}; see `_report`."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps([*map(dataclasses.astuple, jobs)]), folder],
            env=os.environ | WITHOUT_A_TPU | {"LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
            timeout=1200,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True))


def _main(jobs, folder):
    reports = []
    for fields in json.loads(jobs):
        try:
            reports.append(_report(_compile(Job(*fields)), folder))
        except Exception as error:
            reports.append({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        for file in glob.glob(f"{folder}/*"):
            os.remove(file)
    print(json.dumps(reports))


def _compile(job):
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    import q4jax
    from q4jax.core.arrays_in_stack import ArraysInStack
    from q4jax.pallas.tpu.implementation import PallasTPU
    from q4jax.pallas.tpu.placement import formats

    topology = topologies.get_topology_desc(TOPOLOGIES[job.chip], platform="tpu")
    here = SingleDeviceSharding(topology.devices[0])
    kernels = {"implementation": "pallas"}

    def operand(*shape):
        return jax.ShapeDtypeStruct(shape, job.dtype, sharding=here)

    def quantize(w, implementation="xla"):
        static = {"check_finite": False, "implementation": implementation}
        return q4jax.Params4bit.quantize(w, job.blocksize, job.nested, "nf4", **static)

    def weight(stacked=()):
        function = jax.vmap(quantize) if stacked else quantize
        shape = jax.eval_shape(function, operand(*stacked, job.n, job.k))
        spec = shape.quant_state.spec
        where = formats(shape.arrays, here, spec) if job.placed else shape.arrays
        leaves, tree = jax.tree.flatten(shape)
        places = jax.tree.leaves(where) if job.placed else [here] * len(leaves)
        return tree.unflatten(
            [
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
                for a, place in zip(leaves, places, strict=True)
            ]
        )

    def linear(x, weight):
        return q4jax.matmul_4bit(x, weight, **kernels)

    def gradient(g, weight):
        x = jnp.zeros((job.m, job.k), job.dtype)
        return jax.vjp(lambda x: linear(x, weight), x)[1](g)[0]

    def scan(x, stack):
        """Forward and backward through each layer of a stack, by its number."""
        spec, tpu = stack.quant_state.spec, PallasTPU()

        def layer(x, number):
            named = ArraysInStack(stack.arrays, (number,))
            y = tpu.linear(x, named, None, spec=spec)
            return tpu.linear_transpose(y, named, spec=spec), None

        return jax.lax.scan(layer, x, jnp.arange(4))[0]

    functions = {
        "linear": (linear, lambda: (operand(job.m, job.k), weight())),
        "gradient": (gradient, lambda: (operand(job.m, job.n), weight())),
        "dequantize": (lambda w: w.dequantize(**kernels), lambda: (weight(),)),
        "quantize": (lambda w: quantize(w, "pallas"), lambda: (operand(job.n, job.k),)),
        "scan": (scan, lambda: (operand(job.m, job.k), weight((4,)))),
        "None": (q4jax.matmul_4bit, lambda: (operand(job.m, job.k), weight())),
    }
    function, operands = functions[job.program]
    return jax.jit(function).lower(*operands()).compile()


def _report(compiled, folder):
    """Kernel -> bundles; bytes of temporaries; the largest array of bytes that is copied."""
    text = compiled.as_text()
    bundles = {}
    for file in sorted(glob.glob(f"{folder}/*q4jax_tpu_*-final_bundles.txt")):
        if "schedule-analysis" not in file:
            name = re.search(r"q4jax_tpu_([a-z_]+)", file)[1]
            with open(file) as code:
                bundles[name] = _bundles(code.read())
    return {
        "bundles": bundles,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "moved": bytes_moved(text),
    }


def bytes_moved(text):
    """The size of the largest array of bytes that a program's HLO copies, cuts or transposes."""
    moved = re.findall(r" = u8\[([\d,]+)\]\S* (?:copy|transpose|dynamic-slice|fusion)\(", text)
    return max((math.prod(map(int, shape.split(","))) for shape in moved), default=0)


def _bundles(code):
    """How many bundles there are at each depth of loops: 0 outside, 1 in a step of the grid."""
    depths = re.findall(r"(?m)^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:> ?)*)\{", code)
    counts = [0] * 6
    for depth in depths:
        counts[depth.count(">")] += 1
    return counts


if __name__ == "__main__":
    _main(*sys.argv[1:])
