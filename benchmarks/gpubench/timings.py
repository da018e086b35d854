"""Goes through the rows, the most important first, until time is up; then says what was reached."""

import math
import time

from gpubench import goals, measure
from gpubench.clock import one_line
from q4jax.gpu import tiles

JOBS_AT_ONCE = 16


def measure_rows(bench, rows, others, broken):
    """Times of all candidates of all rows.

    Args:
      bench: the means.
      rows: in order of importance.
      others: implementations beside the measured one, of products.
      broken: (implementation, operation) that the check found wrong: these are not timed.

    Returns:
      ({row: {candidate: microseconds}}, names of what was dropped for lack of time,
      [{"case", "reason"}] of what failed or disagreed with the dense product).
    """
    separate = [] if (bench.kernels, "dequantize") in broken else [measure.SEPARATE]

    def names(row):
        if not row.m:
            return [bench.kernels]
        by_xla = [measure.DENSE_BY_XLA] if row.m == 1 else []
        return [measure.DENSE, *by_xla, bench.kernels, *others, *separate]

    # XLA's own form is the slowest and the least in doubt: last, and first to be dropped.
    work = [(row, names(row)) for row in rows] + [(row, ["xla"]) for row in rows if row.m]
    work = [
        (row, [name for name in names if (name, row.operation) not in broken])
        for row, names in work
    ]
    times, dropped, failures = {}, [], []
    batch, per_job = [], 0.0
    for number, (row, row_names) in enumerate(work):
        batch.append((row, row_names))
        size = sum(len(names) for _, names in batch)
        if size < JOBS_AT_ONCE and number + 1 < len(work):
            continue
        if bench.budget.left() < 1.2 * per_job * size or bench.budget.spent():
            dropped += [f"{row}: {', '.join(names)}" for row, names in batch]
        else:
            start = time.monotonic()
            try:
                failures += _measure(bench, batch, times)
            except Exception as error:  # such as no memory: what was measured must not be lost
                case = "; ".join(str(row) for row, _ in batch)
                failures.append({"case": case, "reason": one_line(error)})
            per_job = (time.monotonic() - start) / max(1, size)
            left = bench.budget.left()
            print(f"  {number + 1} of {len(work)} rows, {left:.0f} s left", flush=True)
        batch = []
    return times, dropped, failures


def _measure(bench, batch, times):
    """Adds to `times`; what failed."""
    jobs = [
        job
        for row, names in batch
        for job in measure.jobs(row, names, bench.kernels, bench.weights)
    ]
    failures, expected, alive = [], {}, []
    for job in bench.ready(jobs):
        row, name = job.key
        result = job.first_result()
        if job.error is not None:
            continue
        if row.m:
            # "dense" comes first in its row; without one (XLA's own, later) there is no other.
            reference = expected.setdefault(row, result)
            off = measure.disagreement(result, reference)
            if off is not None and not off < measure.DISAGREEMENT:
                reason = f"differs from the dense product by {off:.3g} of its norm"
                failures.append({"case": f"{row}: {name}", "reason": reason})
                continue
        alive.append(job)
    failures += [
        {"case": f"{job.key[0]}: {job.key[1]}", "reason": job.error} for job in jobs if job.error
    ]
    for job, microseconds in zip(alive, bench.clock.microseconds(alive), strict=True):
        row, name = job.key
        if microseconds > 0:
            times.setdefault(row, {})[name] = microseconds
        else:
            failures.append({"case": f"{row}: {name}", "reason": "the profiler recorded nothing"})
    return failures


def records(times, rates, bench):
    """A record of each row: times, what of the floor is reached, ratios, goals."""
    return [_record(row, found, rates, bench) for row, found in times.items()]


def _record(row, found, rates, bench):
    packed = bench.weights.get(row.n, row.k)[0][0]
    nbytes, operations = measure.cost(row, packed)
    by_bytes = nbytes / rates["copy_bytes_per_second"] * 1e6
    by_operations = operations / rates["bf16_flop_per_second"] * 1e6
    floor = max(by_bytes, by_operations)
    way = bench.kernels
    if row.m and row.m > tiles.crossover(row.operation, measure.DTYPE):
        way = measure.SEPARATE
    record = {
        "operation": row.operation,
        "n": row.n,
        "k": row.k,
        "m": row.m,
        "us": {name: round(us, 3) for name, us in found.items()},
        "way": way,
        "floor_us": round(floor, 3),
        "floor_is": "bytes" if by_bytes >= by_operations else "operations",
        "fraction_of_floor": {name: round(floor / us, 4) for name, us in found.items()},
        "share_of_copy_bandwidth": None,
        "against": {},
        "goals": [],
    }
    if way not in found:
        return record
    mine = found[way]
    record["share_of_copy_bandwidth"] = round(by_bytes / mine, 4)
    against = {name: us / mine for name, us in found.items() if name != way}
    dense = [found[n] for n in (measure.DENSE, measure.DENSE_BY_XLA, "cublas") if n in found]
    values = {goals.BANDWIDTH: by_bytes / mine}
    if dense:
        values[goals.DENSE] = min(dense) / mine
    if "bitsandbytes" in found:
        values[goals.BITSANDBYTES] = against["bitsandbytes"]
    record["against"] = {name: round(ratio, 4) for name, ratio in against.items()}
    record["goals"] = [
        {
            "regime": goal.regime,
            "metric": goal.metric,
            "value": round(values[goal.metric], 4),
            "floor": goal.floor,
            "aim": goal.aim,
            "verdict": goal.verdict(values[goal.metric]),
        }
        for goal in goals.goals(row, packed.packed.nbytes)
        if goal.metric in values
    ]
    return record


def summary(records):
    """For each regime: its cells, the worst and their geometric mean, and whether these will do."""
    regimes = {}
    for record in records:
        for goal in record["goals"]:
            regimes.setdefault((goal["regime"], goal["metric"]), []).append(goal)
    lines = []
    for (regime, metric), cells in regimes.items():
        values = [cell["value"] for cell in cells]
        mean = math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
        floor, aim = cells[0]["floor"], cells[0]["aim"]
        lines.append(
            {
                "regime": regime,
                "metric": metric,
                "cells": len(cells),
                "worst": round(min(values), 3),
                "geometric_mean": round(mean, 3),
                "floor": floor,
                "aim": aim,
                "floor_met": min(values) >= floor,
                "aim_met": aim is not None and mean >= aim,
            }
        )
    return lines
