"""What the tests on meshes share: meshes, weights on them, and programs."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import q4jax

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def mesh_of(kind: AxisType = AUTO, **sizes: int) -> Mesh:
    """A mesh of the first devices, with these axes."""
    count = int(np.prod(list(sizes.values())))
    devices = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(kind,) * len(sizes))


def normal(seed: int, *shape: int, dtype="float32") -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def place(weight: q4jax.Params4bit, mesh: Mesh, spec: P) -> q4jax.Params4bit:
    """The weight with codes and scales split by `spec`, the rest replicated but for its lead."""
    lead = len(weight.quant_state.lead)

    def put(array: jax.Array) -> jax.Array:
        own = spec if array.ndim == lead + 2 else P(*spec[: min(lead, array.ndim)])
        return jax.device_put(array, NamedSharding(mesh, own))

    return jax.tree.map(put, weight)


def put(array: jax.Array, mesh: Mesh, *spec) -> jax.Array:
    """The array, split by `spec`."""
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))
