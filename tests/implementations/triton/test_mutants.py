"""The Triton kernels with one instruction altered, as `gpu/test_mutants.py` alters the others."""

import pytest

from tests.support.gpu.aot import compiles_triton
from tests.support.ptx.mutation import CALLS, JOINED_COPIES, assert_noticed

pytestmark = compiles_triton()

# Alterations that change nothing that counts: a pattern, how many of them a kernel may have, why.
HARMLESS = [
    JOINED_COPIES,
    (r"deleted: bar\.sync", 3, "another one is before the next access to what others touch"),
    (r"deleted: fence\.proxy\.async", 1, "that of a step's first half has shown the second's x"),
    (r"constant \+ 1: mov\.u16 \S+ 0x0$", 4, "a masked number, 0, becomes a subnormal one"),
    (r"constant \+ 1: (and\.b32|bfe\.u32)", 4, "a bit that is 0 in the other operand"),
    (r"(to setp|sources swapped).*: setp\.lt\.s32", 4, "a limit that no thread meets"),
    (
        r"(constant .*|to sub\.s32): add\.s32 \S+ \S+ \d+$",
        6,
        "a row that is below the limit in any case, or a number whose last bits are shifted out",
    ),
    (r"guard dropped: .* st\.global", 2, "of a row that is below the limit in any case"),
    (r"constant \+ 1: setp\.lt\.u64", 1, "copies of a tile behind the last, which nothing reads"),
    (
        r"constant \+ 1: add\.s64",
        4,
        "an address that is not used, or a number whose last bits are not",
    ),
    (
        r"constant \+ 1: (max\.s32 \S+ \S+ 0$|mad\.lo\.s64)|to shr\.b32: shl\.b32",
        3,
        "the number of the first tile or of the only weight, 0",
    ),
    (r"constant \+ 1: shr\.s32 \S+ \S+ 31$", 1, "no bit but the sign is left"),
]


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("triton")])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_an_altered_instruction_is_noticed(gpu, call, pytestconfig):
    assert_noticed(call, gpu, pytestconfig.getoption("--mutants"), HARMLESS)
