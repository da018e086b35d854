"""What the shipped tiles ask of each resource of a multiprocessor, counted, and what that allows.

A multiprocessor serves one wavefront of shared memory a clock, 64 ALU instructions and 128 issue
slots. docs/gpu.md has these numbers beside what the memory of each GPU could deliver. Needs the
extra `aot`.
"""

import functools

import pytest

from q4jax.gpu import tiles
from tests.support.gpu.aot import needs_aot
from tests.support.gpu.budget import budget

pytestmark = needs_aot("triton")

# GPU, M -> wavefronts, sectors, ALU instructions and issue slots a weight.
LIMITS = {
    ("sm_90", 1): (0.0586, 0.0415, 2.64, 4.19),
    ("sm_90", 16): (0.0586, 0.0489, 2.62, 4.20),
    ("sm_90", 64): (0.0792, 0.0801, 3.32, 6.36),
    ("sm_90", 128): (0.0874, 0.1114, 3.29, 6.75),
    ("sm_90", 256): (0.1748, 0.2227, 6.57, 13.50),
    ("sm_80", 1): (0.0977, 0.0415, 2.65, 5.58),
    ("sm_80", 16): (0.0977, 0.0489, 2.64, 5.58),
    ("sm_80", 64): (0.1416, 0.0801, 4.02, 11.05),
    ("sm_80", 128): (0.3218, 0.1114, 5.82, 16.75),
    ("sm_80", 256): (0.6436, 0.2227, 11.63, 33.50),
}
LIMITS |= {("sm_89", m): limits for (gpu, m), limits in LIMITS.items() if gpu == "sm_80"}
ROOM = 1.05  # for another release of the compiler
# Weights a clock and multiprocessor that the scarcest resource allows at least.
CEILINGS = {("sm_90", 1): 17.0, ("sm_90", 16): 17.0, ("sm_80", 1): 10.2, ("sm_89", 1): 10.2}


@functools.cache
def counted(gpu, m):
    chosen = tiles.choose(m, (4096, 4096), "bfloat16", transpose=False)
    return budget(gpu, m, chosen)


@pytest.mark.parametrize(("gpu", "m"), LIMITS, ids=lambda value: str(value))
def test_what_a_weight_asks_for(gpu, m):
    found = counted(gpu, m)
    names = ("shared", "sectors", "alu", "issue")
    over = {
        name: (found[name], limit)
        for name, limit in zip(names, LIMITS[gpu, m], strict=True)
        if found[name] > ROOM * limit
    }
    assert not over, found
    assert found["ceiling"] >= CEILINGS.get((gpu, m), 0) / ROOM


def test_why_a_tile_has_128_rows_of_x_at_most():
    """At 256 rows the sums alone do not fit an L4's shared memory, or W's rows are too few.

    These cost a third more sectors, for wavefronts that are but a few percent less.
    """
    now, other = counted("sm_90", 256), budget("sm_90", 256, tiles.Tile(256, 64, 64, 4, 2))
    assert 1 < other["ceiling"] / now["ceiling"] < 1.1
    assert other["sectors"] > 1.3 * now["sectors"]
    with pytest.raises(RuntimeError, match="Shared memory size limit exceeded"):
        budget("sm_89", 256, tiles.Tile(256, 128, 64, 8, 2))


def test_a_wider_tile_is_bound_by_shared_memory():
    """Why the tiles are 128 columns wide: at 256, rows of the decoded tile share banks."""
    narrow = counted("sm_90", 1)
    wide = budget("sm_90", 1, tiles.Tile(16, 64, 256, 4, 3))
    assert wide["ceiling"] == pytest.approx(1 / wide["shared"], rel=1e-3)
    assert narrow["ceiling"] > 1.7 * wide["ceiling"]
