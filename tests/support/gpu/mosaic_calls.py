"""A kernel of Mosaic GPU, compiled for a GPU that need not be there: its PTX and its launch."""

import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from tests.support.gpu import mosaic_host
from tests.support.gpu.targets import lower_for, mesh_of, nothing_read_from_disk
from tests.support.ptx.machine import Launch

# By the kernel's hash: jaxlib keeps a kernel that it has compiled, and says nothing of it again.
_compiled: dict[str, tuple[str, Launch]] = {}
_HASH = re.compile(r'kernel_hash = "([^"]*)"')


def compile_kernel(gpu: str, function: Callable[..., Any], *shapes: Any) -> tuple[str, Launch]:
    """The PTX and the launch of the one kernel of a function.

    Args:
      gpu: a key of `GPUS`.
      function: the function.
      *shapes: shapes and dtypes of its arguments.
    """
    mesh = mesh_of(gpu)
    lowered = lower_for(mesh, function, *shapes)
    [key] = _HASH.findall(lowered.as_text())
    if key not in _compiled:
        with tempfile.TemporaryDirectory() as folder:
            # What jaxlib reads of these is whether they are there.
            os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
            try:
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nothing_read_from_disk():
                    lowered.compile()
            finally:
                del os.environ["MOSAIC_GPU_DUMP_TO"], os.environ["MOSAIC_GPU_DUMP_HOST_LLVM"]
            [ptx], [host] = (list(pathlib.Path(folder).glob(f"*.{end}")) for end in ("ptx", "ll"))
            _compiled[key] = ptx.read_text(), mosaic_host.read(host.read_text())
    return _compiled[key]
