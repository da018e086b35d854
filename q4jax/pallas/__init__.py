"""The GPU kernels: the implementations "pallas" and, the same interpreted, "pallas_interpret"."""

from q4jax.pallas.operations import Operations

compiled = Operations("pallas")
interpreted = Operations("pallas_interpret")
