"""The implementation "native": C++ kernels for CPU, called through `jax.ffi`.

They are optional when the package is built, and are used where they were built for this machine:
`status()` tells. The environment variable `Q4JAX_NATIVE`, read when they are first asked for,
turns them off ("0") or names an instruction set ("avx512_bf16", "avx512", "avx2", "neon",
"portable").
"""

from q4jax.native.library import Status, status

__all__ = ["Status", "status"]
