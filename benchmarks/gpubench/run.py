"""The command: arguments, the order of things, the exit code."""

import argparse
import json
import os
import pathlib
import sys

import jax

from gpubench import bench, check, device, goals, measure, report, timings, tune
from gpubench.clock import ROUNDS, Clock

RESULTS = pathlib.Path(__file__).parents[1] / "results"
LOUD = "DRY RUN on CPU with interpreted kernels: the figures mean nothing"
QUICK_MS = (1, 16, 64, 512, 4096, 32)
PEER_SHARE = 0.25
"""Of the time, that PyTorch may take at most."""


def main(argv):
    """Run it; the exit code."""
    args = arguments(argv)
    if args.dry_run and args.out is None:
        print("--dry-run needs --out, a folder for what must not pass for results", file=sys.stderr)
        return 2
    if args.dry_run and args.tune:
        print(
            "--tune rewrites tiles.json from what it measures; not in a --dry-run", file=sys.stderr
        )
        return 2
    where = jax.devices("cpu")[0] if args.dry_run else device.gpu()
    if where is None:
        print("no NVIDIA GPU is visible to jax; --dry-run goes through the motions on CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    means = make_bench(args, device.describe(where))
    folder = args.out or RESULTS / device.folder_name(where)
    results = {
        "about": device.describe(where),
        "dry_run": args.dry_run,
        "command": " ".join(argv),
        "weights": "nf4, blocksize 64, double quantization; bfloat16",
        "checks": {},
    }
    if args.dry_run:
        print(LOUD, flush=True)
    print(json.dumps(results["about"]), flush=True)
    results["checks"], broken, others = run_checks(args, means)
    if not args.check_only:
        denominators = measure.small_denominators() if args.dry_run else measure.denominators()
        results["rates"] = means.rates(denominators, args.clock == "profiler" and not args.dry_run)
        results["clock"] = {"kind": means.clock.kind, "reason": means.clock.reason}
        print(json.dumps({**results["rates"], **results["clock"]}), flush=True)
        if args.tune:
            results["tuning"] = run_tuning(means, broken)
        else:
            run_timings(args, means, others, broken, results)
    results["seconds"] = round(means.budget.elapsed(), 1)
    names = report.write(folder, results)
    print(report.table(results))
    print(f"{', '.join(names)} in {folder}, after {results['seconds']:.0f} s")
    if args.dry_run:
        print(LOUD)
    failed = any(c.get("failures") for c in results["checks"].values())
    return 1 if failed or results.get("timing_failures") else 0


def arguments(argv):
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder; default benchmarks/results/<gpu>")
    parser.add_argument("--check-only", action="store_true", help="no timings")
    parser.add_argument("--quick", action="store_true", help="few checks, one shape, six M")
    parser.add_argument("--tune", action="store_true", help="rewrite tiles.json, then stop")
    parser.add_argument("--dry-run", action="store_true", help="on CPU, tiny; needs --out")
    parser.add_argument("--budget", type=float, default=440, help="seconds; rows are dropped")
    parser.add_argument("--clock", choices=("profiler", "wall"), default="profiler")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    return parser.parse_args(argv)


def make_bench(args, about):
    """What the measurements share; small in a dry run."""
    if args.dry_run:
        kernels, shapes, cache_bytes = "pallas_interpret", ((64, 128),), 0
        run_us, most_calls, rounds = 1, 2, 2
    else:
        kernels, shapes, cache_bytes = "pallas", goals.SHAPES, 3 * about["l2_bytes"]
        run_us, most_calls, rounds = 1000 if args.clock == "profiler" else 10_000, 24, ROUNDS
        shapes = tune.SHAPES if args.tune else shapes[:1] if args.quick else shapes
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


def run_checks(args, means):
    """(reports, what is broken, other implementations to time)."""
    cases = check.dry_cases() if args.dry_run else check.all_cases()
    if args.quick and not args.dry_run:
        cases = check.quick_cases()
    checks, broken, others = {}, set(), []
    for name in (means.kernels, "triton"):
        reason = check.unavailable(name) if name == "triton" else None
        if reason:
            checks[name] = {"unavailable": reason}
            continue
        mine = cases if name != "triton" else [c for c in cases if c.is_product]
        checks[name] = found = check.run(name, mine, means.threads)
        others += [name] if name == "triton" else []
        broken |= {(name, failure["operation"]) for failure in found["failures"]}
        seconds = means.budget.elapsed()
        print(f"{name}: {found['run']} checks, {len(found['failures'])} failed, {seconds:.0f} s")
        for failure in found["failures"]:
            print(f"  FAILED {failure['case']}: {failure['reason']}", flush=True)
    return checks, broken, others


def run_timings(args, means, others, broken, results):
    """Adds rows, a summary, what was dropped and what failed."""
    ms = (1, 5) if args.dry_run else QUICK_MS if args.quick else goals.MS
    rows = goals.rows(means.shapes, ms)
    peers = {}
    if not args.dry_run:
        products = [row for row in rows if row.m]
        seconds = PEER_SHARE * means.budget.left()
        results["torch"], peers = bench.torch_peer(products, means, seconds)
        print(json.dumps(results["torch"]), flush=True)
    times, dropped, failures = timings.measure_rows(means, rows, others, broken)
    for row, found in peers.items():
        if row in times:
            times[row] |= found
    results["rows"] = timings.records(times, results["rates"], means)
    results["summary"] = timings.summary(results["rows"])
    results["dropped"] = dropped
    results["timing_failures"] = failures


def run_tuning(means, broken):
    """Rewrites the table, of kernels that are right; what was tried."""
    if broken:
        print("nothing is tuned while a check fails", flush=True)
        return []
    table = json.loads(tune.TABLE.read_text())
    record = tune.tune(means, table, "16 bits")
    tune.save(table)
    record += tune.crossovers(means, table, tune.CROSSOVER_MS)
    record += tune.tune(means, table, "float32")
    tune.save(table)
    return record
