"""TPUs to compile for on a machine that has none, and what the compiled programs are."""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from tests.support.gpu.targets import nothing_read_from_disk

# libtpu would ask the metadata server of Google's cloud, and for a lock on the chips.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MISSING = None if importlib.util.find_spec("libtpu") else "libtpu is not installed: q4jax[tpu]"
TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4"}


@functools.cache
def devices(chip: str) -> np.ndarray:
    """Eight chips."""
    os.environ |= {name: os.environ.get(name, value) for name, value in _ALONE.items()}
    return np.array(topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices)


def mesh_of(chip: str, kind: AxisType, **sizes: int) -> Mesh:
    """A mesh of the first chips, with these axes."""
    count = int(np.prod(list(sizes.values())))
    grid = devices(chip)[:count].reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(kind,) * len(sizes))


def on_one(chip: str, tree: Any) -> Any:
    """Shapes and dtypes, on the first chip."""
    sharding = SingleDeviceSharding(devices(chip)[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      text: its HLO.
      temporary: bytes in HBM beside arguments and results.
      cycles: XLA's estimate; what is in a loop counts once.
      cpu_seconds: what compiling took.
    """

    text: str
    temporary: int
    cycles: int
    cpu_seconds: float


def compiled(function: Any, *args: Any, **static: Any) -> Program:
    """Compile for the chips on which the arguments are."""
    with nothing_read_from_disk():
        lowered = (function if hasattr(function, "lower") else jax.jit(function)).lower(
            *args, **static
        )
        began = time.process_time()
        program = lowered.compile()
        seconds = time.process_time() - began
    text = program.as_text()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return Program(text, program.memory_analysis().temp_size_in_bytes, cycles, seconds)
