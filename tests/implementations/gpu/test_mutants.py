"""That a fault in a compiled kernel would be noticed: kernels with one instruction altered.

`--mutants 210` alters that many instructions of each kernel for each GPU.
"""

import re

import pytest

from tests.support.gpu.aot import needs_aot
from tests.support.ptx.mutation import CASES, survivors

pytestmark = needs_aot()

# Alterations that change nothing that counts: a pattern, how many of them a kernel may have, why.
HARMLESS = [
    (
        r"deleted: cp\.async\.commit_group",
        5,
        "the copies, before the loop, join a group of one wait",
    ),
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
    (r"to add\S+: mul\.rn\.f32 .* 0f00000000", 4, "a weight of 0 becomes a subnormal number"),
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


def unexplained(found):
    """Those of the surviving mutants that no pattern explains, or that are too many for theirs."""
    left = {pattern: most for pattern, most, _ in HARMLESS}
    rest = []
    for mutant in found:
        text = f"{mutant.what}: {mutant.instruction.text}"
        pattern = next((p for p in left if re.match(p, text)), None)
        if pattern is None or not left[pattern]:
            rest.append(str(mutant))
        else:
            left[pattern] -= 1
    return rest


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_an_altered_instruction_is_noticed(gpu, name, pytestconfig):
    count = pytestconfig.getoption("--mutants")
    tally, found = survivors(gpu, name, count)
    assert tally.total() == count
    assert not unexplained(found)
    assert len(found) <= count / 4
