"""compute-sanitizer and Nsight Compute, around a small program of q4jax's kernels.

The program is this one with `--child`: a few cases of each kernel, then a product with one row.
"""

import csv
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp

from gpubench import check
from q4jax import Params4bit, matmul_4bit

GPU = pathlib.Path(__file__).parents[1] / "gpu.py"
SANITIZERS = ("memcheck", "racecheck")
COUNTERS = (
    "gpu__time_duration.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "lts__t_sectors_op_read.sum",
    "dram__bytes_read.sum",
    "smsp__inst_issued.sum",
    "sm__inst_executed_pipe_alu.sum",
)
PRODUCT = (4096, 4096)


def child(dry_run):
    """Run the program; 1 where a case is wrong."""
    implementation = "pallas_interpret" if dry_run else "pallas"
    failures = check.run(implementation, check.dry_cases()[: 1 if dry_run else None], 1)["failures"]
    shape = (64, 128) if dry_run else PRODUCT
    make = jax.jit(lambda w: Params4bit.quantize(w, 64, True, "nf4", implementation="xla"))
    weight = make(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))
    x = jnp.ones((1, shape[1]), jnp.bfloat16)
    jax.block_until_ready(jax.jit(matmul_4bit, static_argnames="implementation")(
        x, weight, implementation=implementation
    ))  # fmt: skip
    return 1 if failures else 0


def sanitize(seconds, dry_run):
    """Sanitizer -> {"summary"} or {"error"} of the program, or {"unavailable"}: why not."""
    if dry_run:
        ended = f"dry run; the program itself ended with {child(dry_run)}"
        return {name: {"unavailable": ended} for name in SANITIZERS}
    found = {}
    for name in SANITIZERS:
        options = ["--tool", name, "--kernel-regex", "kns=q4jax_"]
        code, output = _run("compute-sanitizer", options, seconds / len(SANITIZERS))
        found[name] = {"unavailable": output} if code is None else sanitized(code, output)
    return found


def sanitized(code, output):
    """What a sanitizer's output says."""
    [*_, summary] = [line for line in output.splitlines() if "SUMMARY" in line] or [""]
    numbers = re.findall(r"(\d+) (?:error|hazard)", summary)
    if numbers and not any(map(int, numbers)) and not code:
        return {"summary": summary.strip("= ")}
    first = next((line for line in output.splitlines() if re.search("Error|Invalid", line)), "")
    return {"error": f"exit code {code}: {summary.strip('= ')} {first.strip('= ')}".strip()}


def counters(seconds, dry_run):
    """Counter -> its value for the product's kernel, or {"unavailable": why not}."""
    options = ["--csv", "--kernel-name", "q4jax_linear", "--metrics", ",".join(COUNTERS)]
    if dry_run:
        return {"unavailable": "dry run"}
    code, output = _run("ncu", options, seconds)
    if code is None:
        return {"unavailable": output}
    return counted(output) or {"unavailable": (output.strip().splitlines() or ["no output"])[-1]}


def counted(output):
    """The counters of the last kernel in Nsight Compute's CSV."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    rows = [row for row in csv.DictReader(lines[start:]) if row.get("Metric Name") in COUNTERS]
    last = [row for row in rows if row["ID"] == rows[-1]["ID"]]
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit'] or ''}".strip()
        for row in last
    }


def _run(tool, options, seconds):
    """(exit code, output) of the program in a tool; (None, why not) where there is no such tool."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")
    if path is None:
        return None, f"{tool} is not installed"
    program = [sys.executable, str(GPU), "--child", "--step", "check", "--out", "."]
    try:
        done = subprocess.run(
            [path, *options, *program], capture_output=True, text=True, timeout=max(30, seconds)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{tool}: {type(error).__name__}"
    return done.returncode, done.stdout + done.stderr
