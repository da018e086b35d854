"""Fails where `import q4jax` adds 0.3 s or more to `import flax`: the median of seven processes.

Processor time, so that what else the machine does is not counted; the wall time is printed too.
"""

import statistics
import subprocess
import sys

LIMIT = 0.3
RUNS = 7
MEASURE = """
import time, flax
wall, cpu = time.perf_counter(), time.process_time()
import q4jax
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main() -> int:
    """Returns the exit status."""
    runs = []
    for _ in range(RUNS + 1):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        )
        runs.append([float(seconds) for seconds in done.stdout.split()])
    # The first one compiles the bytecode.
    wall, cpu = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    print(f"import q4jax adds {cpu:.3f} s to import flax (limit {LIMIT} s; wall time {wall:.3f} s)")
    return int(cpu >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
