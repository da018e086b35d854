"""Checks, tunes and times q4jax's GPU kernels, on a machine with an NVIDIA GPU.

    export PYTHONPATH=.                     # from a checkout: nothing has to be installed but jax
    python benchmarks/gpu.py --step check --out results     # every kernel against the reference
    python benchmarks/gpu.py --step tune --out results      # tries tiles; proposes a table
    python benchmarks/gpu.py --step measure --out results   # times, beside cuBLAS and bitsandbytes

Each call takes less than ten minutes, writes only under `--out` and prints a short table last, at
whose end is what failed. A later step reads what an earlier one left there: kernels that were wrong
are not timed, the others are; the proposed tiles are measured. `--dry-run` walks all of it on a
CPU, with interpreted kernels, and says that its figures mean nothing.

matplotlib adds a plot; torch adds cuBLAS as PyTorch calls it, and bitsandbytes the kernels of
bitsandbytes; compute-sanitizer adds its checks, and ncu counters of a kernel. What is measured, and
how, is said in `gpubench/`. Exit codes: 0, 1 where something failed, 2 where there is no GPU.
"""

import os
import sys

if __name__ == "__main__":
    # These are read when jax starts. Memory is taken as needed, because PyTorch needs some, too.
    # Without command buffers (CUDA graphs) the profiler sees each kernel.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if "--dry-run" in sys.argv:
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif platforms and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # the reference runs there

    from gpubench import run

    sys.exit(run.main(sys.argv[1:]))
