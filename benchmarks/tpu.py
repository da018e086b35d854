"""Checks and times q4jax on a TPU, for the first hour on one.

    export PYTHONPATH=.                     # from a checkout: nothing has to be installed but jax
    python benchmarks/tpu.py --out results  # every operation against the reference, then times

The two forms of q4jax for TPUs are compared with the plain form on the CPU, as
`gpubench/check.py` says: `xla`, which is the default, and `pallas`, the Mosaic kernels. Then
products, for layers' shapes, are timed beside a dense bfloat16 product and, where qwix is
installed, its nf4 with scales in blocks of 64. What was wrong is not timed; the rest is.

A timed program runs an operation on many weights in turn, more bytes than a chip holds in its own
memory, and often enough that starting it from the host does not count (`gpubench/clock.py`). The
figures are microseconds of one call.

`--dry-run` walks all of it on a CPU and says that its figures mean nothing. Exit codes: 0, 1 where
something failed, 2 where there is no TPU.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import sys

if __name__ == "__main__" and (platforms := os.environ.get("JAX_PLATFORMS")):
    # The reference runs on the CPU. These are read when jax starts.
    wanted = "cpu" if "--dry-run" in sys.argv else f"{platforms},cpu"
    os.environ["JAX_PLATFORMS"] = ",".join(dict.fromkeys(wanted.split(",")))

import jax
import jax.numpy as jnp
from gpubench import check, device, measure
from gpubench.bench import Bench, Budget
from gpubench.clock import ROUNDS, Clock, Job, one_line

LOUD = "DRY RUN on CPU with simulated kernels: the figures mean nothing"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
MS = (1, 8, 128, 512, 2048)
OPERATIONS = ("linear", "linear_transpose")
CACHE_BYTES = 256 * 2**20
"""More than the memory of a chip's own."""
RUN_US, MOST_CALLS = 20_000, 24
PACKAGES = ("jax", "jaxlib", "libtpu", "qwix")
DENSE, QWIX = "dense", "qwix nf4"


def main(argv):
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="tpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="on CPU, tiny")
    parser.add_argument("--budget", type=float, default=3000, help="seconds; the rest is dropped")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    if not args.dry_run and jax.default_backend() != "tpu":
        print("no TPU is visible to jax; --dry-run goes through the motions on CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    means = make_bench(args)
    results = {"about": about(), "dry_run": args.dry_run, "command": " ".join(argv)}
    if args.dry_run:
        print(LOUD, flush=True)
    print(json.dumps(results["about"]), flush=True)
    results["checks"] = checks(args)
    results["rows"], results["dropped"], failures = times(args, means, results["checks"])
    results["failures"] = failures + [
        {"case": f"{name}: {failure['case']}", "reason": failure["reason"]}
        for name, found in results["checks"].items()
        for failure in found["failures"]
    ]
    results["seconds"] = round(means.budget.elapsed(), 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tpu.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results)
    (args.out / "tpu.md").write_text(text)
    print(text)
    return 1 if results["failures"] else 0


def make_bench(args):
    """What the measurements share; small in a dry run."""
    return Bench(
        kernels=forms(args.dry_run)[-1],
        shapes=((64, 128),) if args.dry_run else SHAPES,
        weights=measure.Weights(0 if args.dry_run else CACHE_BYTES),
        clock=Clock(rounds=2 if args.dry_run else ROUNDS),
        budget=Budget(args.budget),
        threads=args.threads,
        run_us=1 if args.dry_run else RUN_US,
        most_calls=2 if args.dry_run else MOST_CALLS,
    )


def about():
    """The chips and the software."""
    where = jax.devices()
    return {
        "device": where[0].device_kind,
        "chips": len(where),
        "python": platform.python_version(),
        "versions": device.versions(PACKAGES),
    }


def forms(dry_run):
    """The implementations: the default, and the kernels."""
    return ("xla", "pallas_tpu_interpret" if dry_run else "pallas")


def checks(args):
    """Implementation -> what `check.run` found."""
    cases = check.dry_cases() if args.dry_run else check.all_cases()
    found = {}
    for name in forms(args.dry_run):
        found[name] = check.run(name, cases, args.threads, refusals=True)
        print(check.summary(name, found[name]), flush=True)
    return found


def times(args, means, checked):
    """(rows of the table, what the budget dropped, failures)."""
    ms = (2,) if args.dry_run else MS
    rows, dropped, failures = [], [], []
    for n, k in means.shapes:
        for m in ms:
            for operation in OPERATIONS:
                name = f"{operation} [{n}, {k}] M={m}"
                if means.budget.spent():
                    dropped.append(name)
                    continue
                found, errors = row(operation, n, k, m, means, checked)
                failures += [{"case": f"{name}: {who}", "reason": e} for who, e in errors.items()]
                rows.append({"operation": operation, "n": n, "k": k, "m": m, "us": found})
                print(f"{name}: {json.dumps(found)}", flush=True)
        # Those of the shape before are let go.
        means.weights = measure.Weights(means.weights.cache_bytes)
    return rows, dropped, failures


def row(operation, n, k, m, means, checked):
    """({candidate: microseconds}, {candidate: why it has none})."""
    packed, dense = means.weights.get(n, k)
    transposed = operation == "linear_transpose"
    x = jax.random.normal(jax.random.key(m), (m, n if transposed else k), measure.DTYPE)
    spec = packed[0].quant_state.spec
    estimate = max(10.0, n * k / 4e5)
    plain = functools.partial(measure.dot, transposed=transposed)
    jobs = [Job(DENSE, plain, x, dense, estimate)]
    for name, found in checked.items():
        wrong = {failure["operation"] for failure in found["failures"]}
        if found["run"] and operation not in wrong:
            run = measure.operation(operation, name, spec)
            jobs.append(Job(name, run, x, packed, estimate))
    jobs += qwix_jobs(x, dense, transposed, estimate)
    ready = means.ready([job for job in jobs if job.error is None])
    results = {job.key: job.first_result() for job in ready}
    for name in checked:
        if name in results and results[name] is not None and results[DENSE] is not None:
            off = measure.disagreement(results[name], results[DENSE])
            if off is not None and not off < measure.DISAGREEMENT:
                [job] = [job for job in jobs if job.key == name]
                job.error = f"differs from the dense product by {off:.2g} of its norm"
    alive = [job for job in jobs if job.error is None]
    found = zip((job.key for job in alive), means.clock.microseconds(alive), strict=True)
    errors = {job.key: job.error for job in jobs if job.error is not None}
    return {name: round(us, 2) for name, us in found}, errors


def qwix_jobs(x, dense, transposed, estimate):
    """Its nf4, where it is installed."""
    try:
        import qwix
    except ImportError:
        return []

    @jax.jit
    def quantize(w):
        scales = {"tiled_axes": {1: 64}, "channelwise_axes": [0]}
        return qwix.quantize(w, "nf4", **scales, scale_dtype=jnp.float32)

    def product(x, w):
        axes = (((1,), (0 if transposed else 1,)), ((), ()))
        return qwix.dot_general(x, w, axes).astype(x.dtype)

    try:
        weights = [quantize(w) for w in dense]
    except Exception as error:
        failed = Job(QWIX, product, x, [], estimate)
        failed.error = one_line(error)
        return [failed]
    return [Job(QWIX, product, x, weights, estimate)]


def report(results):
    """The table, and what failed at its end."""
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["us"]))
    lines = [LOUD, ""] if results["dry_run"] else []
    versions = ", ".join(f"{k} {v}" for k, v in results["about"]["versions"].items())
    lines += [f"{results['about']['device']}, {versions}: microseconds of a call", ""]
    lines += [f"| | weight | M | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for one in results["rows"]:
        cells = [f"{one['us'][name]:.1f}" if name in one["us"] else "" for name in names]
        weight = f"{one['n']} x {one['k']}"
        lines.append(f"| {one['operation']} | {weight} | {one['m']} | {' | '.join(cells)} |")
    lines += ["", *(f"Not measured, for lack of time: {name}" for name in results["dropped"])]
    lines += [f"- FAILED {f['case']}: {f['reason']}" for f in results["failures"]]
    count = len(results["failures"])
    lines += [f"**{count} failed**" if count else "**Nothing failed.**"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
