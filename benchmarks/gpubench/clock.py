"""How long an operation takes on the device.

The program that is timed runs the operation on several weights in turn, more bytes than the L2
cache holds, so that each is read from memory. It is one compiled loop, for the host must not be
waited for. XLA sees that the operations share their activation and would merge them into one
product, hoist them out of the loop or drop all but the last: each therefore takes its operands
through an optimization barrier that also takes the result before it, and the program returns the
results. No kernel is added by that but a counter for each trip around many operations. (XLA keeps
the barriers to the end for GPUs; for CPUs it does not, and the figures of a dry run are wrong.)

Time is that of the kernels as the profiler (CUPTI) records it: launches from the host, which at
M = 1 take as long as the kernels, do not count. `jax.profiler.ProfileData` reads the recording, so
nothing has to be installed. The busy time is the union of the intervals in which a kernel ran.
Several programs share a recording, separated by pauses. Where there is no recording (no CUPTI, no
right to use it), the same programs are timed by wall clock: an upper bound.
"""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PAUSE = 0.012
_GAP_NS = 6e6
ROUNDS = 5


def chain(operation, calls, trips):
    """The program f(x, weights) -> `calls` results, over `trips` trips; the last trip's."""
    once = jax.jit(operation)  # traced and lowered once, not `calls` times

    def run(x, weights):
        def trip(i, _):
            results, last = [], i
            for call in range(calls):
                weight = weights[call % len(weights)]
                first, weight, _ = lax.optimization_barrier((x, weight, last))
                last = once(first, weight)
                results.append(last)
            return results

        shape = jax.eval_shape(operation, x, weights[0])
        zeros = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape) for _ in range(calls)]
        return lax.fori_loop(0, trips, trip, zeros)

    return run


@dataclasses.dataclass
class Job:
    """A program to be timed.

    Attributes:
      key: whose it is.
      operation: f(x, weight).
      x: its first operand.
      weights: more than the cache holds.
      estimate: microseconds that a call may take; decides how many make a run.
      options: for XLA.
      compiled: the program, once compiled.
      error: in one line, where it could not be compiled or run.
    """

    key: Any
    operation: Any
    x: Any
    weights: list
    estimate: float
    options: dict = dataclasses.field(default_factory=dict)
    compiled: Any = None
    error: str | None = None
    calls: int = 0
    trips: int = 0

    def plan(self, run_us, most_calls):
        """Enough calls in a trip to hide its counter, enough trips to fill `run_us`."""
        copies = len(self.weights)
        wanted = min(most_calls, 1000 / self.estimate)
        self.calls = copies * max(1, round(wanted / copies))
        self.trips = max(2, round(run_us / (self.calls * self.estimate)))

    def compile(self):
        """Trace, lower and compile; safe in a thread."""
        try:
            program = chain(self.operation, self.calls, self.trips)
            lowered = jax.jit(program).lower(self.x, self.weights)
            self.compiled = lowered.compile(compiler_options=self.options or None)
        except Exception as error:
            self.error = one_line(error)

    def run(self):
        """Start it; its results."""
        return self.compiled(self.x, self.weights)

    def first_result(self):
        """The result for the first weight; None and `error` where it fails."""
        try:
            return jax.block_until_ready(self.run())[0]
        except Exception as error:
            self.error = one_line(error)
            return None


def one_line(error):
    """What went wrong, for a record."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]}"


def compile_all(jobs, threads):
    """XLA compiles outside Python's lock; nothing may be timed meanwhile."""
    with futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda job: job.compile(), jobs))


class Clock:
    """Times jobs by the profiler where that works, else by wall clock.

    Args:
      probe: a compiled job to try the profiler with; None to use wall clock.
      rounds: runs of each job, of whose times the median counts.

    Attributes:
      kind: "profiler" or "wall".
      reason: why it is not the profiler.
    """

    def __init__(self, probe=None, rounds=ROUNDS):
        self.rounds = rounds
        self.kind, self.reason = "wall", "not asked for"
        if probe is None:
            return
        try:
            [found] = self._profiled([probe])
            [wall] = self._wall([probe])
            if not 0 < found < 1.1 * wall:
                raise ValueError(f"{found} us of kernels in {wall} us of wall time")
            self.kind, self.reason = "profiler", ""
        except Exception as error:
            self.reason = one_line(error)

    def microseconds(self, jobs):
        """Of one call, for each; the jobs are compiled and have run once. NaN: not recorded."""
        if self.kind == "wall":
            return self._wall(jobs)
        try:
            return self._profiled(jobs)
        except Exception:
            if len(jobs) == 1:
                return [math.nan]
            # A pause of the host looked like the end of a job, or one fails: each by itself.
            return [us for job in jobs for us in self.microseconds([job])]

    def _wall(self, jobs):
        found = []
        for job in jobs:
            times = []
            for _ in range(self.rounds):
                start = time.perf_counter()
                jax.block_until_ready(job.run())
                times.append(time.perf_counter() - start)
            found.append(statistics.median(times) * 1e6 / (job.calls * job.trips))
        return found

    def _profiled(self, jobs):
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            jax.profiler.start_trace(folder, profiler_options=options)
            try:
                for job in jobs:
                    time.sleep(PAUSE)
                    results = None
                    for _ in range(self.rounds):
                        results = job.run()
                    jax.block_until_ready(results)
            finally:
                jax.profiler.stop_trace()
            [path] = pathlib.Path(folder).glob("**/*.xplane.pb")
            intervals = kernel_intervals(jax.profiler.ProfileData.from_file(str(path)))
        parts = split(intervals, len(jobs))
        return [
            median_busy(part, self.rounds) / 1e3 / (job.calls * job.trips)
            for part, job in zip(parts, jobs, strict=True)
        ]


def kernel_intervals(profile):
    """Sorted (start, end) in ns of what ran on the first GPU: its planes' lines are streams."""
    intervals = []
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")] or lines
        for line in streams:
            intervals += [(e.start_ns, e.start_ns + e.duration_ns) for e in line.events]
    return sorted(intervals)


def split(intervals, parts):
    """The intervals of each job; ValueError where there are not as many as jobs."""
    groups, end = [], None
    for interval in intervals:
        if end is None or interval[0] - end > _GAP_NS:
            groups.append([])
            end = interval[1]
        groups[-1].append(interval)
        end = max(end, interval[1])
    if len(groups) != parts:
        raise ValueError(f"the profiler recorded {len(groups)} groups of kernels, not {parts}")
    return groups


def busy(intervals):
    """The length of their union."""
    total, end = 0.0, float("-inf")
    for start, stop in intervals:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def median_busy(intervals, rounds):
    """Of one round: the median where the rounds can be told apart by count, else the mean."""
    size, rest = divmod(len(intervals), rounds)
    if rest:
        return busy(intervals) / rounds
    return statistics.median(busy(intervals[i * size : (i + 1) * size]) for i in range(rounds))
