"""Checks and times q4jax's GPU kernels, on a machine with an NVIDIA GPU.

    python benchmarks/gpu.py                # checks, then times; writes benchmarks/results/<gpu>/
    python benchmarks/gpu.py --check-only   # every kernel against the reference, no timings
    python benchmarks/gpu.py --quick        # fewer checks, one shape, six M
    python benchmarks/gpu.py --tune         # tries tiles; rewrites q4jax/gpu/tiles.json
    python benchmarks/gpu.py --dry-run --out dry-run   # all of it, tiny, on CPU: no results

Nothing but `pip install -e '.[cuda]'` is needed. matplotlib adds a plot; torch adds cuBLAS as
PyTorch calls it, and bitsandbytes the kernels of bitsandbytes. What is measured, and how, is said
in `gpubench/`: `check`, `clock`, `measure`, `goals`. Exit codes: 0, 1 where a check failed, 2 where
there is no GPU.
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
