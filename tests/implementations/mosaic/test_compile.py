"""What the TPU compiler makes of the kernels: bundles, temporaries, and copies of codes.

Nothing here runs on a TPU. A bundle is a set of instructions that start in one cycle; the count is
that of a step of the grid, in which a bundle runs once. Ceilings are a few per cent above what
libtpu 0.0.42 and 0.0.50 make, so that a change that makes a kernel worse shows.
"""

import math

import jax.numpy as jnp
import pytest

from q4jax.pallas.tpu import tiles
from tests.support.compiled_for_tpu import Job, compile_all, missing

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

# Products of a bundle's four matrix units: 197 Tflop/s at 1.5 GHz, and 918 at 1.75.
PRODUCTS = {"v5e": 4 * 128**2, "v6e": 4 * 256**2}

# Bundles for 1024 weights; HBM alone takes 1.05 on v5e and 0.61 on v6e.
PER_1024 = {
    Job("linear", "v5e"): 1.85,
    Job("linear", "v6e"): 2.05,
    Job("linear", "v5e", nested=True): 1.85,
    Job("linear", "v5e", blocksize=32): 2.35,
    Job("linear", "v5e", blocksize=4096): 1.75,
    Job("linear", "v5e", k=14336): 1.85,
    Job("gradient", "v5e"): 1.90,
    Job("gradient", "v6e"): 2.10,
    Job("linear", "v5e", dtype="float32"): 4.00,
}
# Times the cycles that the matrix units take for the products themselves.
OF_PRODUCTS = {
    Job("linear", "v5e", m=512): 1.00,
    Job("linear", "v6e", m=512): 1.40,
    Job("gradient", "v5e", m=512): 1.05,
    Job("gradient", "v6e", m=512): 1.70,
}
OTHERS = [
    Job("scan", "v5e", nested=True),
    Job("dequantize", "v5e"),
    Job("dequantize", "v6e", nested=True),
    Job("quantize", "v5e"),
    Job("quantize", "v6e", blocksize=4096),
    Job("linear", "v5e", n=200, k=352, blocksize=32, nested=True),
    Job("gradient", "v6e", n=200, k=352, blocksize=32, nested=True),
    Job("linear", "v5e", n=40, k=96, blocksize=32, dtype="float32"),
    Job("linear", "v5p", nested=True),
    Job("linear", "v5e", placed=False),
    Job("None", "v5e", n=512, k=512),
    Job("linear", "v5e", n=512, k=512, dtype="float16"),
]


@pytest.fixture(scope="module")
def reports():
    return compile_all([*PER_1024, *OF_PRODUCTS, *OTHERS])


def tile_and_bundles(job, report):
    """The tile of a product, and the bundles of a step with it."""
    transpose = job.program == "gradient"
    tile = tiles.choose(job.m, job.n, job.k, jnp.dtype(job.dtype), transpose=transpose)
    return tile, sum(report["bundles"]["linear_transpose" if transpose else "linear"])


@pytest.mark.parametrize("job", PER_1024, ids=str)
def test_bundles_of_few_rows(reports, job):
    tile, bundles = tile_and_bundles(job, reports[job])
    assert bundles / (tile.n * tile.k / 1024) <= PER_1024[job]


@pytest.mark.parametrize("job", OF_PRODUCTS, ids=str)
def test_bundles_of_many_rows(reports, job):
    tile, bundles = tile_and_bundles(job, reports[job])
    assert bundles <= OF_PRODUCTS[job] * tile.m * tile.n * tile.k / PRODUCTS[job.chip]


@pytest.mark.parametrize("job", [*PER_1024, *OF_PRODUCTS], ids=str)
def test_codes_are_read_where_they_lie(reports, job):
    """No copy of the codes or the weight: less than 1% of the dense one."""
    assert reports[job]["moved"] == 0
    assert reports[job]["temporary"] <= 0.01 * 2 * job.n * job.k


def test_codes_of_the_default_layout_are_copied(reports):
    """Which shows that `moved` counts."""
    job = Job("linear", "v5e", placed=False)
    assert reports[job]["moved"] == job.n * job.k // 2


def test_a_scan_over_layers_copies_no_weight(reports):
    report = reports[Job("scan", "v5e", nested=True)]
    assert set(report["bundles"]) == {"scales", "linear", "linear_transpose"}
    assert report["moved"] == 0
    assert report["temporary"] <= 2**18


@pytest.mark.parametrize("job", [job for job in OTHERS if "quantize" in job.program], ids=str)
def test_bundles_of_conversions(reports, job):
    """A loop's bundles run for each 64 rows of a tile of 2048 or 4096 rows by 128 columns."""
    [(outside, step, loop, *_)] = [
        counts for name, counts in reports[job]["bundles"].items() if name != "scales"
    ]
    rows = max(2048, job.blocksize if job.program == "quantize" else 0)
    total = outside + step + loop * (rows // 64)
    assert total / (rows * 128 / 1024) <= {"dequantize": 3.6, "quantize": 53.0}[job.program]


@pytest.mark.parametrize(
    "job", [job for job in OTHERS if job.n < 512 or job.chip == "v5p"], ids=str
)
def test_others_compile(reports, job):
    """Ragged tiles, weights smaller than a register's width, another chip."""
    assert math.prod(map(sum, reports[job]["bundles"].values())) > 1


def test_none_takes_no_kernel(reports):
    """Until docs/tpu.md has a run on a TPU."""
    report = reports[Job("None", "v5e", n=512, k=512)]
    assert report["bundles"] == {}


def test_float16_is_refused(reports):
    report = reports[Job("linear", "v5e", n=512, k=512, dtype="float16")]
    assert report["error"] == (
        "NotImplementedError: implementation='pallas' serves products in bfloat16 and float32 on "
        "TPUs, which have no float16; 'xla' and None work"
    )
