"""What Triton kernels become on a GPU, found on a machine that has none."""

import collections
import dataclasses
import pathlib
import re
import subprocess
import tempfile

from tests.support.gpu.triton_calls import calls


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel in machine code.

    Attributes:
      registers: of a thread.
      spilled: bytes of a thread that spilled to local memory.
      shared_bytes: of a program.
      opcodes: how often each stands in the code, and without what follows its first dot.
    """

    registers: int
    spilled: int
    shared_bytes: int
    opcodes: collections.Counter[str]


def kernels(gpu, function, *args):
    """The Triton kernels of a function of these shapes."""
    return [_assemble(call) for call in calls(gpu, function, *args)]


def _assemble(call):
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    target = re.search(r"\.target (sm_\w+)", call.ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        source.write_text(call.ptx)
        command = [tools / "ptxas", "-v", "--gpu-name", target, source, "-o", binary]
        messages = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [tools / "cuobjdump", "-sass", binary]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_.]*)", sass)
    count = collections.Counter(opcodes)
    count.update(name.split(".")[0] for name in opcodes if "." in name)
    return Kernel(
        int(re.search(r"Used (\d+) registers", messages)[1]),
        sum(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", messages))),
        call.launch.shared_bytes,
        count,
    )
