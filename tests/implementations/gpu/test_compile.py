"""Every kernel compiled for four GPUs without one: what the machine code must and must not hold.

Needs the extra `aot` (about 1.5 GB). A kernel that decodes more slowly, spills, or no longer loads
16 bytes at a time fails here, before any GPU has seen it.
"""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from tests.support.gpu.cells import CELLS
from tests.support.gpu.cubin import Kernel

_MISSING = [
    name
    for name in ("jax_cuda13_plugin", "triton", "nvidia")
    if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(_MISSING), reason=f"needs the extra aot; not installed: {_MISSING}"),
]

ROOT = pathlib.Path(__file__).parents[3]
GPUS = ["sm_80", "sm_89", "sm_90", "sm_100"]
ALU = ("PRMT", "SHF", "LOP3", "F2FP", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "PLOP3", "MOV")
# Operation, bytes of the dtype -> registers a thread.
REGISTERS = {
    ("linear", 2): 250,
    ("linear", 4): 240,
    ("linear_transpose", 2): 208,
    ("linear_transpose", 4): 136,
    ("dequantize", 2): 64,
    ("dequantize", 4): 96,
    ("quantize", 2): 208,
    ("quantize", 4): 184,
}
TENSOR_CORE = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": ("UTCHMMA", "HMMA")}


@functools.cache
def compiled(gpu):
    """Cell name -> kernel name -> Kernel; an error stays an error."""
    command = [sys.executable, "-m", "tests.support.gpu.compile_kernels", gpu]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        cell: found
        if "error" in found
        else {name: Kernel(**fields) for name, fields in found.items()}
        for cell, found in json.loads(done.stdout).items()
    }


# One process compiles all for a GPU, where tests are spread over several by group.
@pytest.fixture(params=[pytest.param(g, marks=pytest.mark.xdist_group(g)) for g in GPUS])
def gpu(request):
    return request.param


def kernel_of(gpu, cell):
    found = compiled(gpu)[cell.name]
    assert "error" not in found, f"{gpu} {cell.name}: {found['error']}"
    [name] = [name for name in found if name.startswith("q4jax_")]
    assert name == f"q4jax_{cell.operation}"
    return found[name]


def test_all_cells_compile_without_spilling(gpu):
    assert len(compiled(gpu)) == len(CELLS)
    for cell in CELLS:
        kernel = kernel_of(gpu, cell)
        bytes_ = 4 if cell.dtype == "float32" else 2
        assert (kernel.stack, kernel.local) == (0, 0), cell
        assert kernel.count("LDL") + kernel.count("STL") == 0, cell
        assert kernel.registers <= REGISTERS[cell.operation, bytes_], (cell, kernel.registers)


def test_loads_of_16_bytes(gpu):
    """Codes, which are most of what is read, come 16 bytes a thread, straight to shared memory
    where there is a loop."""
    for cell in CELLS:
        kernel = kernel_of(gpu, cell)
        wide = kernel.count("LDGSTS.E.BYPASS.128") + kernel.count("LDG.E.128")
        assert wide, cell
        if cell.operation in ("linear", "linear_transpose"):
            assert kernel.count("LDGSTS.E.BYPASS.128") == wide, cell
        if cell.operation in ("quantize", "dequantize"):
            assert kernel.count("STG.E.128"), cell


def test_tensor_cores(gpu):
    for cell in CELLS:
        if cell.operation not in ("linear", "linear_transpose"):
            continue
        kernel = kernel_of(gpu, cell)
        instructions = sum(kernel.count(n) for n in ("HMMA", "HGMMA", "UTCHMMA"))
        if cell.dtype == "float32":
            assert instructions == 0, f"{cell}: float32 products must not be rounded to fewer bits"
            continue
        assert instructions, cell
        if cell.operation == "linear":
            names = TENSOR_CORE[gpu]
            names = (names,) if isinstance(names, str) else names
            assert any(kernel.count(name) for name in names), (cell, kernel.opcodes)


def per_weight(cell, kernel):
    """(decode ALU, all ALU, all issued) instructions a weight in the loop over the weight."""
    # tiles.json: 64 x 256 weights over 128 threads a step, of which the loop holds one.
    weights = 64 * 256 // 128
    prmt = kernel.count("PRMT", "loop")
    assert 2 * weights <= prmt < 2.5 * weights, f"not one step a loop: {cell} has {prmt} PRMT"
    decode = prmt + sum(kernel.count(name, "loop") for name in ("SHF", "LOP3", "F2FP"))
    alu = sum(kernel.count(name, "loop") for name in ALU)
    return decode / weights, alu / weights, sum(kernel.loop.values()) / weights


MATVECS = [c for c in CELLS if c.operation == "linear" and c.m <= 16 and c.dtype != "float32"]


@pytest.mark.parametrize("cell", [c for c in MATVECS if c.blocksize >= 64], ids=lambda c: c.name)
def test_decode_instructions(gpu, cell):
    """The limits of the matvec: 2.9 ALU instructions and 5.8 issue slots a weight on Hopper.

    On Blackwell jax 0.10.2 mixes more arithmetic of addresses into the loop.
    """
    decode, alu, issued = per_weight(cell, kernel_of(gpu, cell))
    assert decode <= (2.8 if gpu == "sm_100" else 2.65), decode
    assert alu <= (3.4 if gpu == "sm_100" else 2.9), alu
    assert issued <= {"sm_90": 5.0, "sm_100": 8.0}.get(gpu, 6.5), issued


def test_a_split_sum_is_one_small_kernel_more(gpu):
    """Beside the kernels only sums of partial results run, none that could hold a weight."""
    for cell in CELLS:
        extra = {n: k for n, k in compiled(gpu)[cell.name].items() if not n.startswith("q4jax_")}
        extra = {n: k for n, k in extra.items() if not n.startswith("__cuda")}  # subroutines
        assert len(extra) <= (1 if cell.operation in ("linear", "linear_transpose") else 0), (
            cell,
            extra,
        )
