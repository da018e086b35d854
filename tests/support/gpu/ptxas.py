"""PTX through the assembler that the extra `aot` installs."""

import importlib.util
import pathlib
import subprocess
import tempfile

from tests.support.gpu import cubin


def assemble(ptx: str) -> tuple[cubin.Kernel, str]:
    """The one kernel of a module for Hopper, and what the assembler says of it."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [_ptxas(), "-arch=sm_90a", "-v", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        [kernel] = cubin.of_file(target.read_bytes()).values()
    return kernel, done.stderr


def _ptxas() -> pathlib.Path:
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None and spec.submodule_search_locations is not None
    found = [
        p for at in spec.submodule_search_locations for p in pathlib.Path(at).glob("*/bin/ptxas")
    ]
    assert found, "nvidia-cuda-nvcc is not installed"
    return found[0]
