"""The addresses of the last program of each kernel, for arrays of more than 2^31 and 2^32 bytes.

Needs the extra `aot`.
"""

import functools

import pytest

from tests.support.gpu.addresses import Program
from tests.support.gpu.aot import needs_aot, run_compiler
from tests.support.gpu.cells import HUGE

AOT = needs_aot()
GPUS = ["sm_80", "sm_90"]
DYNAMIC_MAP = "f32[256]"  # the place in it depends on data


@functools.cache
def extents(gpu):
    return run_compiler("extents", gpu)


@pytest.mark.parametrize(
    "gpu", [pytest.param(g, marks=[*AOT, pytest.mark.xdist_group(g)]) for g in GPUS]
)
@pytest.mark.parametrize("cell", HUGE, ids=lambda cell: cell.name)
def test_the_last_program_ends_where_the_arrays_end(gpu, cell):
    found = extents(gpu)[cell.name]
    assert sum(extent["write"] for extent in found) == (2 if cell.operation == "quantize" else 1)
    assert max(extent["size"] for extent in found) > 2**31
    for extent in found:
        assert extent["first"] >= 0, extent
        if extent["array"] != DYNAMIC_MAP:
            assert extent["end"] == extent["size"], extent


@pytest.mark.parametrize(
    "gpu", [pytest.param(g, marks=[*AOT, pytest.mark.xdist_group(g)]) for g in GPUS]
)
@pytest.mark.parametrize("cell", HUGE, ids=lambda cell: cell.name)
def test_no_sector_of_a_weight_is_asked_for_twice(gpu, cell):
    """Of codes, of a weight that is quantized, and of what quantize and dequantize write."""
    weight, *others = extents(gpu)[cell.name]
    assert weight["sectors"] <= weight["least_sectors"]
    if cell.operation in ("quantize", "dequantize"):
        for extent in others:
            assert not extent["write"] or extent["sectors"] < extent["least_sectors"] + 1, extent


PTX = """
.visible .entry kernel(
    .param .u64 .ptr kernel_param_0,
    .param .u64 .ptr kernel_param_1
)
.reqntid 64, 1, 1
{
    .reg .pred %p<4>;
    ld.param::entry.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %tid.x;
    shl.b32 %r3, %r1, 6;
    or.b32 %r4, %r3, %r2;
    setp.lt.u32 %p1, %r2, 48;
    mul.wide.s32 %rd3, %r4, 16;
    add.s64 %rd4, %rd1, %rd3;
    mov.b32 %r9, 0;
$L__BB0_1:
    @%p1 ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd4 + 1024 ];
    add.s32 %r9, %r9, 1;
    setp.ne.b32 %p2, %r9, 3;
    @%p2 bra $L__BB0_1;
    mul.lo.s32 %r10, %r4, 65536;
    cvt.s64.s32 %rd5, %r10;
    add.s64 %rd6, %rd2, %rd5;
    not.pred %p3, %p1;
    { .reg .f32 a; mul.rn.f32 a, %f1, %f1; add.rn.f32 %f2, a, a; }
    @!%p3 st.global.b8 [ %rd6 ], { %rs1 };
    ret;
}
"""


def test_a_program_by_hand():
    """Three loads of 48 lanes, and a store whose offset overflows in the last program."""
    *loads, store = Program(PTX, "kernel", (511, 0, 0)).run()
    assert len(loads) == 3
    for load in loads:
        assert (load.array, load.write, load.size) == (0, False, 16)
        assert load.offsets.tolist() == [(511 * 64 + t) * 16 + 1024 for t in range(48)]
        assert len(load.sectors()) == 24
    assert (store.array, store.write, store.size) == (1, True, 1)
    assert store.offsets.tolist() == [(511 * 64 + t) * 65536 for t in range(48)]
    *_, store = Program(PTX, "kernel", (512, 0, 0)).run()
    assert store.offsets[0] == 512 * 64 * 65536 - 2**32
    assert len(store.sectors()) == 48


def test_an_address_that_depends_on_unknown_values_is_an_error():
    unknown = PTX.replace("add.s64 %rd6, %rd2, %rd5;", "add.s64 %rd6, %rd2, %rd9;")
    with pytest.raises(AssertionError, match="rd6"):
        Program(unknown, "kernel", (0, 0, 0)).run()
