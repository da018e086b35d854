"""`benchmarks/collectives.py` reads how often collectives run, as both compilers write it."""

import pytest
from collectives import collectives  # benchmarks/ is on the path by conftest.py

CPU = """\
%body (p: (s32[], u8[8,4])) -> (s32[], u8[8,4]) {
  %g = u8[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}

ENTRY %main (a: u8[1,4]) -> u8[8,4] {
  %w = (s32[], u8[8,4]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""
TPU = """\
%cond (p: (s32[], u8[8,4])) -> pred[] {
  %other = s32[]{:T(128)} constant(9)
  %constant.7 = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.7), direction=LT, metadata={op_name="lt"}
}

%fused.1 (x: u8[1,4]) -> u8[8,4] {
  %g.1 = u8[8,4]{1,0:T(4,128)(4,1)} all-gather(%x), channel_id=1, \
frontend_attributes={chain_id="0"}
}

%fused.2 (x: u8[1,4]) -> u8[8,4] {
  %g.2 = u8[8,4]{1,0:T(4,128)(4,1)S(1)} all-gather(%x), channel_id=1, \
frontend_attributes={chain_id="0"}
}

%body (p: (s32[], u8[8,4])) -> (s32[], u8[8,4]) {
  %f.1 = u8[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %f.2 = u8[8,4]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
}

ENTRY %main (a: u8[1,4]) -> u8[8,4] {
  %w = (s32[], u8[8,4]) while(%t), condition=%cond, body=%body, metadata={op_name="while"}
}
"""


@pytest.mark.parametrize("text", [CPU, TPU], ids=["cpu", "tpu"])
def test_a_gather_in_a_loop(text):
    [found] = collectives(text)
    assert found == ("all-gather", "u8", (8, 4), 3)
    assert found.nbytes == 96


def test_two_gathers_of_two_chains():
    other = TPU.replace("channel_id=1, ", "channel_id=2, ", 1)
    assert [found.times for found in collectives(other)] == [3, 3]


STARTS = {
    "(u8[1,4]{1,0}, u8[8,4]{1,0}) all-gather-start": [("u8", (8, 4))],
    "((u8[1,4], bf16[2]), (u8[8,4], bf16[16])) all-gather-start": [
        ("u8", (8, 4)),
        ("bf16", (16,)),
    ],
    "(bf16[112,8]{1,0}, bf16[112,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start": [
        ("bf16", (112, 8))
    ],
    "(f32[4], f32[2]) all-reduce-start": [("f32", (4,)), ("f32", (2,))],
}


@pytest.mark.parametrize("start", STARTS)
def test_a_start_gives_its_results_only(start):
    text = f"ENTRY %main (a: u8[1,4]) -> u8[8,4] {{\n  %s = {start}(%a), channel_id=1\n}}\n"
    found = [(one.dtype, one.shape) for one in collectives(text)]
    assert found == STARTS[start]
