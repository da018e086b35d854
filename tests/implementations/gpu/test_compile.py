"""Every kernel compiled for four GPUs without one: what the machine code must and must not hold.

Needs the extra `aot` (about 1.5 GB). A kernel that decodes more slowly, spills, or no longer loads
16 bytes at a time fails here, before any GPU has seen it.
"""

import functools

import pytest

from tests.support.gpu import cubin
from tests.support.gpu.aot import needs_aot, run_compiler
from tests.support.gpu.cells import CELLS
from tests.support.gpu.cubin import Kernel

pytestmark = needs_aot("triton")

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
    return {
        cell: found
        if "error" in found
        else {name: Kernel(**fields) for name, fields in found.items()}
        for cell, found in run_compiler("compile_kernels", gpu).items()
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
    where there is a loop, and through the L1 cache where another load takes the rest of a sector.

    Some tiles are so small that a thread loads 8 bytes of codes.
    """
    for cell in CELLS:
        kernel = kernel_of(gpu, cell)
        past_l1, through_l1 = (kernel.count(f"LDGSTS.E.{n}128") for n in ("BYPASS.", ""))
        direct = kernel.count("LDG.E.128")
        assert past_l1 + through_l1 + direct, cell
        if cell.operation in ("linear", "linear_transpose"):
            assert not direct, cell
            through_l1 += kernel.count("LDGSTS.E.64")
            if cell.dtype != "float32":
                assert bool(through_l1) == (cell.blocksize > 32), cell
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
    # tiles.json: 128 x 128 weights over 128 threads a step, of which the loop holds one.
    weights = 128 * 128 // 128
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


def test_a_wrong_guess_of_where_the_cubin_is_does_not_count(monkeypatch):
    damaged = b"\x7fELF" + bytes(4000)
    candidates = iter([[damaged, damaged], [b"\x7fELF" + b"\xff" * 4000]])
    monkeypatch.setattr(cubin, "_candidates", lambda data, depth: candidates)
    monkeypatch.setattr(cubin.serialize_executable, "serialize", lambda compiled: [b""])
    with pytest.raises(ValueError, match="no cubin that can be read"):
        cubin.kernels(None)
    assert next(candidates, None) is None  # each was tried
