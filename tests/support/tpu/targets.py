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
from scale_targets import ALONE  # benchmarks/ is on the path by conftest.py

from tests.support.gpu.targets import nothing_read_from_disk

MISSING = None if importlib.util.find_spec("libtpu") else "libtpu is not installed: q4jax[tpu]"
TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4"}
OTHERS = {"v5p": "v5p:2x2x2", "TPU7x": "TPU7x:2x2x1"}  # a TPU7x is two devices


@functools.cache
def devices(chip: str) -> np.ndarray:
    """Eight devices."""
    os.environ |= {name: os.environ.get(name, value) for name, value in ALONE.items()}
    name = (TOPOLOGIES | OTHERS)[chip]
    return np.array(topologies.get_topology_desc(name, platform="tpu").devices)


def unknown(chip: str) -> str | None:
    """Why this libtpu cannot compile for a chip, or None."""
    try:
        devices(chip)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return f"libtpu does not know {chip}: {str(error).splitlines()[0]}"
    return None


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
