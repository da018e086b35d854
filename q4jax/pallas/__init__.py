"""The GPU kernels: the implementations "pallas" and, the same interpreted, "pallas_interpret"."""

from q4jax.pallas.implementation import Operations, WhereVerified

compiled = Operations("pallas")
interpreted = Operations("pallas_interpret")
where_verified = WhereVerified("pallas")
