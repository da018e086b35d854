"""What all measurements of a run share: the clock, the weights, the time that is left."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

from gpubench import measure
from gpubench.clock import Clock, compile_all, one_line

PEER = pathlib.Path(__file__).with_name("torch_peer.py")


class Budget:
    """Seconds that a run may take, from when it is made."""

    def __init__(self, seconds):
        self.seconds = seconds
        self._start = time.monotonic()

    def elapsed(self):
        return time.monotonic() - self._start

    def left(self):
        return self.seconds - self.elapsed()

    def spent(self):
        return self.left() <= 0


@dataclasses.dataclass
class Bench:
    """The means to measure.

    Attributes:
      kernels: the implementation that is measured.
      shapes: of weights, where a measurement does not say.
      weights, clock, budget: see there.
      threads: that compile.
      run_us: how long a timed program should run.
      most_calls: of the operation, in a trip of its loop.
    """

    kernels: str
    shapes: tuple
    weights: measure.Weights
    clock: Clock
    budget: Budget
    threads: int
    run_us: float
    most_calls: int

    def ready(self, jobs):
        """Compile them; those that can be run."""
        for job in jobs:
            job.plan(self.run_us, self.most_calls)
        compile_all(jobs, self.threads)
        return [job for job in jobs if job.error is None]

    def times(self, jobs):
        """{number of the job: microseconds}, without those that fail."""
        self.ready(jobs)
        for job in jobs:
            if job.error is None:
                job.first_result()
        alive = [i for i, job in enumerate(jobs) if job.error is None]
        found = self.clock.microseconds([jobs[i] for i in alive])
        return {i: us for i, us in zip(alive, found, strict=True) if us > 0}

    def rates(self, denominators, profiler):
        """Bytes and operations a second, of what `measure.denominators` gives; sets the clock."""
        jobs = [job for job, _ in denominators]
        self.ready(jobs)
        for job in jobs:
            job.first_result()
        broken = [f"{job.key}: {job.error}" for job in jobs if job.error]
        if broken:
            raise RuntimeError("; ".join(broken))
        self.clock = Clock(jobs[0] if profiler else None, self.clock.rounds)
        times = self.clock.microseconds(jobs)
        return {
            "copy_bytes_per_second": denominators[0][1] / times[0] * 1e6,
            "bf16_flop_per_second": denominators[1][1] / times[1] * 1e6,
        }


def torch_peer(rows, bench, seconds):
    """(what is known of it, {row: {name: microseconds}}); a reason where PyTorch is missing."""
    asked = {
        "rows": [[row.operation, row.n, row.k, row.m] for row in rows],
        "cache_bytes": bench.weights.cache_bytes,
        "clock": bench.clock.kind,
        "seconds": seconds,
    }
    about, times = {}, {}
    command = [sys.executable, str(PEER), json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30)
        out, error = done.stdout, done.stderr
    except subprocess.TimeoutExpired as expired:
        out, error = (expired.stdout or b"").decode(), "it took too long"
    except OSError as failed:
        out, error = "", one_line(failed)
    by_row = {(r.operation, r.n, r.k, r.m): r for r in rows}
    for line in out.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "us" in record:
            times.setdefault(by_row[tuple(record["row"])], {})[record["name"]] = record["us"]
            about.setdefault("clocks", {})[record["clock"]] = True
        elif "error" in record:
            about.setdefault("errors", []).append(f"{record['row']}: {record['error']}")
        else:
            about |= record
    if not times:
        lines = error.strip().splitlines()
        about["unavailable"] = lines[-1][:300] if lines else "it measured nothing"
    about["clocks"] = sorted(about.get("clocks", {}))
    return about, times
