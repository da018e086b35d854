"""The command: arguments, the order of things, the exit code."""

import argparse
import json
import os
import pathlib
import sys

import jax

from gpubench import bench, check, device, goals, measure, report, timings, tools, tune
from gpubench.clock import ROUNDS, Clock, one_line
from q4jax.gpu import tiles

LOUD = "DRY RUN on CPU with interpreted kernels: the figures mean nothing"
SHAPES, MS = goals.SHAPES[:4], (1, 16, 64, 256)
PEER_SHARE = 0.4
"""Of the time of `measure`, that PyTorch may take at most."""


def main(argv):
    """Run it; the exit code."""
    args = arguments(argv)
    if args.child:
        return tools.child(args.dry_run)
    where = jax.devices("cpu")[0] if args.dry_run else device.gpu()
    if where is None:
        print("no NVIDIA GPU is visible to jax; --dry-run goes through the motions on CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    results = {
        "step": args.step,
        "about": device.describe(where),
        "dry_run": args.dry_run,
        "command": " ".join(argv),
        "weights": "nf4, blocksize 64, double quantization; bfloat16",
        "failures": [],
    }
    if args.dry_run:
        print(LOUD, flush=True)
    print(json.dumps(results["about"]), flush=True)
    means = make_bench(args, results["about"])
    try:
        STEPS[args.step](args, means, results)
    except Exception as error:  # what was found before must not be lost
        results["failures"].append({"case": f"step {args.step}", "reason": one_line(error)})
    results["seconds"] = round(means.budget.elapsed(), 1)
    names = report.write(args.out, results)
    print(f"{', '.join(names)} in {args.out}, after {results['seconds']:.0f} s\n")
    print(report.table(results))
    return 1 if results["failures"] else 0


def arguments(argv):
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=STEPS, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for all files")
    parser.add_argument("--dry-run", action="store_true", help="on CPU, tiny")
    parser.add_argument("--budget", type=float, default=480, help="seconds; the rest is dropped")
    parser.add_argument("--clock", choices=("profiler", "wall"), default="profiler")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_bench(args, about):
    """What the measurements share; small in a dry run."""
    if args.dry_run:
        kernels, shapes, cache_bytes = "pallas_interpret", ((64, 128),), 0
        run_us, most_calls, rounds = 1, 2, 2
    else:
        kernels, shapes, cache_bytes = "pallas", SHAPES, 3 * about["l2_bytes"]
        run_us, most_calls, rounds = 1000 if args.clock == "profiler" else 10_000, 24, ROUNDS
    return bench.Bench(
        kernels=kernels,
        shapes=shapes,
        weights=measure.Weights(cache_bytes),
        clock=Clock(rounds=rounds),
        budget=bench.Budget(args.budget),
        threads=args.threads,
        run_us=run_us,
        most_calls=most_calls,
    )


def step_check(args, means, results):
    """Every kernel against the reference; then compute-sanitizer on a few of them."""
    cases = check.dry_cases() if args.dry_run else check.all_cases()
    results["checks"] = {}
    for name in (means.kernels, "triton"):
        reason = check.unavailable(name) if name == "triton" else None
        if reason:
            results["checks"][name] = {"unavailable": reason}
            continue
        mine = cases if name != "triton" else [c for c in cases if c.is_product]
        results["checks"][name] = found = check.run(
            name, mine, means.threads, refusals=name == "triton"
        )
        print(f"{check.summary(name, found)}\nafter {means.budget.elapsed():.0f} s", flush=True)
        results["failures"] += [
            {"case": f"{name}: {f['case']}", "reason": f["reason"]} for f in found["failures"]
        ]
    results["sanitizer"] = tools.sanitize(means.budget.left(), args.dry_run)
    results["failures"] += [
        {"case": f"compute-sanitizer {name}", "reason": found["error"]}
        for name, found in results["sanitizer"].items()
        if "error" in found
    ]


def step_tune(args, means, results):
    """Tiles and crossovers, into a table under `--out`."""
    set_clock(args, means, results)
    table = json.loads(tune.TABLE.read_text())
    record = results["tuning"] = []
    broken = {operation for name, operation in wrong(args) if name == means.kernels}
    # A dry run tries one tile beside that of the table, in the first row of each operation.
    most, first, ms = (1, 1, (4,)) if args.dry_run else (None, None, tune.CROSSOVER_MS)
    parts = [
        lambda: tune.tune(means, table, "16 bits", broken, most, first),
        lambda: tune.crossovers(means, table, ms, broken),
        lambda: tune.tune(means, table, "float32", broken, most, first),
    ]
    for part in parts[: 2 if args.dry_run else 3]:
        try:
            record += part()
        except Exception as error:
            results["failures"].append({"case": "tuning", "reason": one_line(error)})
        args.out.mkdir(parents=True, exist_ok=True)
        tune.save(table, args.out / "tiles.json")
    results["failures"] += [
        {"case": f"{entry.get('row', 'crossover')}: {failure['tile']}", "reason": failure["reason"]}
        for entry in record
        for failure in entry.get("failures", [])
    ]


def step_measure(args, means, results):
    """Each kernel and what it is compared with; then counters of one kernel."""
    proposed = args.out / "tiles.json"
    results["tiles"] = "the package's"
    if proposed.exists():
        tiles.use_table(json.loads(proposed.read_text()))
        results["tiles"] = "those that --step tune proposes"
    set_clock(args, means, results)
    rows = goals.rows(means.shapes, MS[:1] if args.dry_run else MS)
    peers = {}
    if not args.dry_run:
        products = [row for row in rows if row.m]
        seconds = PEER_SHARE * means.budget.left()
        results["torch"], peers = bench.torch_peer(products, means, seconds)
        print(json.dumps(results["torch"]), flush=True)
    others = [] if check.unavailable("triton") else ["triton"]
    found, results["dropped"], failures = timings.measure_rows(means, rows, others, wrong(args))
    for row, times in peers.items():
        if row in found:
            found[row] |= times
    results["rows"] = timings.records(found, results["rates"], means)
    results["summary"] = timings.summary(results["rows"])
    results["failures"] += failures
    results["counters"] = tools.counters(max(60, means.budget.left()), args.dry_run)


STEPS = {"check": step_check, "tune": step_tune, "measure": step_measure}


def set_clock(args, means, results):
    """Measures what the figures are compared with, and finds a clock that works."""
    denominators = measure.small_denominators() if args.dry_run else measure.denominators()
    results["rates"] = means.rates(denominators, args.clock == "profiler" and not args.dry_run)
    results["clock"] = {"kind": means.clock.kind, "reason": means.clock.reason}
    print(json.dumps({**results["rates"], **results["clock"]}), flush=True)


def wrong(args):
    """(implementation, operation) that an earlier check in `--out` found wrong."""
    try:
        checks = json.loads((args.out / "check.json").read_text())["checks"]
    except (OSError, KeyError):
        return set()
    return {(name, f["operation"]) for name, c in checks.items() for f in c.get("failures", [])}
