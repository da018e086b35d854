"""The devices that `scale.py` compiles for: simulated CPU devices, and TPUs that are not here.

libtpu describes a slice of TPUs to its compiler on any machine. What it says of a program's bytes
is what such a slice would allocate; nothing runs.
"""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

CPU = "cpu"
TOPOLOGIES = {
    "v5e": {8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"},
    "v6e": {8: "v6e:2x4", 64: "v6e:8x8", 256: "v6e:16x16"},
}
TARGETS = (CPU, *TOPOLOGIES)
# libtpu would ask the metadata server of Google's cloud, and for a lock on the chips.
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def why_unreached(target: str) -> str | None:
    """Why nothing can be compiled for a target here, in a line; None: it can."""
    if target != CPU and importlib.util.find_spec("libtpu") is None:
        return f"--target {target} needs libtpu, which is not installed: pip install 'q4jax[tpu]'"
    return None


def device_counts(target: str) -> tuple[int, ...]:
    """How many devices a target may have."""
    return (8, 64, 512) if target == CPU else tuple(TOPOLOGIES[target])


def mesh_on(target: str, sizes: dict[str, int]) -> Mesh:
    """A mesh of a target's devices: of Auto axes on CPU, of Explicit ones on TPUs.

    Auto axes are refused on several TPUs. Call it before anything else of jax in a process.
    """
    count = 1
    for size in sizes.values():
        count *= size
    jax.config.update("jax_platforms", "cpu")
    if target == CPU:
        jax.config.update("jax_num_cpu_devices", count)
        kind, devices = AxisType.Auto, jax.devices()
    else:
        os.environ |= {name: os.environ.get(name, value) for name, value in ALONE.items()}
        name = TOPOLOGIES[target][count]
        found = topologies.get_topology_desc(name, platform="tpu").devices
        kind, devices = AxisType.Explicit, list(found)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=devices
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of a TPU as Markdown, as docs/tpu.md has them."""
    lines = [
        "| model, mesh | arguments | temporary | moved | compiled in |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            cells = f"- | - | - | {row['error']}"
        else:
            sizes = (f"{row[key] / 1e9:.2f}" for key in ("arguments", "temporary", "moved"))
            cells = f"{' | '.join(sizes)} | {row['compile_seconds']:.0f} s"
        lines.append(f"| {row['model'].upper()}, `{row['mesh']}` | {cells} |")
    return "\n".join(lines) + "\n"
