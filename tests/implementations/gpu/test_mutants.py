"""That a fault in a compiled kernel would be noticed: kernels with one instruction altered.

`--mutants 210` alters that many instructions of each kernel for each GPU.
"""

import pytest

from tests.support.gpu.aot import needs_aot
from tests.support.ptx.mutation import CALLS, JOINED_COPIES, ZERO_TO_SUBNORMAL, assert_noticed

pytestmark = needs_aot()

# Alterations that change nothing that counts: a pattern, how many of them a kernel may have, why.
PALLAS = [
    JOINED_COPIES,
    (
        r"deleted: bar\.sync",
        2,
        "until the next barrier threads read what they have copied themselves",
    ),
    (
        r".*: wgmma\.(commit|wait)_group",
        3,
        "the first of a step's two products; the second has a wait",
    ),
    ZERO_TO_SUBNORMAL,
    (r"constant \+ 1: mov\.\w+ \S+ (0|0x0)$", 8, "what a masked load leaves, which is not used"),
    (r"constant \+ 1: and\.b32", 8, "a bit that is 0 in the other operand"),
    (
        r"(to setp|constant|guard).*: (@\S+ )?(setp\.[gl]t|ld\.global)",
        8,
        "a limit that no thread meets",
    ),
    (r"constant \+ 1: mov\.b32 \S+ 1$", 1, "the first buffer's number, which wraps around"),
    (r".*: (shr\.[us]32|selp\.b32|add\.s32|sub\.s32)", 8, "rounds a quotient that is not negative"),
    (r"sources swapped: cvt\.rn\.bf16x2", 4, "two weights of a table with the same high byte"),
    (r"(constant|to sub).*: add\.s64", 4, "an address that is not used, or of masked rows"),
    (
        r"to min\.f32: max\.f32",
        4,
        "one of several large blocks, for all of which a program divides",
    ),
    (r"next float: (setp\.[gl]t\.f32|selp\.f32 \S+ 0f00000000)", 4, "0 or a limit, one unit off"),
]
MOSAIC_GPU = [
    (r"deleted: wgmma\.fence", 5, "the registers were written before another fence"),
    (r"deleted: wgmma\.commit_group", 4, "the products join the next group, with the same wait"),
    (r".*: wgmma\.wait_group", 2, "behind the loop, where each step has waited"),
    (r"deleted: fence\.proxy\.async\.shared::cta", 1, "threads have only read shared memory"),
    (r"deleted: bar\.sync 0", 2, "one of two behind each other"),
    (r".*: mov\.b32 \S+ 1$", 1, "the number of the barrier at which all threads meet"),
    (
        r"(constant \+ 1: (shfl\.sync\.idx|setp\.eq\.and)|to setp\.\w+\.\w+\.b32: setp\.eq\.and)",
        8,
        "another thread is the one that prepares barriers, or copies",
    ),
    (r"guard \w+: .* prefetch\.tensormap", 6, "prefetches, or not"),
    (r"guard negated: @%p\d+ bra \$L__BB0_2", 1, "the other warp group starts the first copies"),
    (r"constant / 2: mad\.lo\.u32 s, m, 0xFFFFFFFF", 16, "the factor's top bit times an even m"),
    ZERO_TO_SUBNORMAL,
    (r"constant \+ 1: setp\.ne\.b32 p, 1, 0", 4, "two numbers that still differ"),
    (
        r"constant (\+ 1: and\.b32|/ 2: and\.b64 \S+ \S+ 16383)",
        4,
        "a bit that is 0 in the other operand, such as the highest of an address",
    ),
    (r"constant / 2: mov\.b32 \S+ 10000000$", 2, "the time limit of a wait that is repeated"),
]
HARMLESS = {"pallas": PALLAS, "mosaic_gpu": MOSAIC_GPU}
KERNELS = [
    (call, gpu)
    for call in CALLS
    for gpu in {"pallas": ("sm_80", "sm_90"), "mosaic_gpu": ("sm_90",)}.get(call.split("-")[0], ())
]


@pytest.mark.parametrize(("call", "gpu"), KERNELS)
def test_an_altered_instruction_is_noticed(call, gpu, pytestconfig):
    implementation, *_ = call.split("-")
    assert_noticed(call, gpu, pytestconfig.getoption("--mutants"), HARMLESS[implementation])
