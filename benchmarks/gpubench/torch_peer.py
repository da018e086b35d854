"""bitsandbytes and PyTorch's cuBLAS on the same rows, in a process of its own.

    python torch_peer.py '{"rows": [["linear", 4096, 4096, 16]], "cache_bytes": 200000000, ...}'

A line of JSON a measurement goes to standard output, so that what is measured is kept when time
runs out. Weights rotate as in `clock`. The clock is the same one, too: kernels' own time as CUPTI
records it (`torch.profiler`); "wall" takes CUDA events around replays of a CUDA graph.
"""

import functools
import json
import math
import statistics
import sys
import time

import torch

MOST_COPIES = 48


def main():
    asked = json.loads(sys.argv[1])
    device = asked.get("device", "cuda")
    deadline = time.monotonic() + asked["seconds"]
    try:
        import bitsandbytes
    except Exception as error:  # its import fails in many ways where a library is missing
        bitsandbytes = None
        print(json.dumps({"bitsandbytes": None, "reason": str(error)[:300]}), flush=True)
    about = {"torch": torch.__version__}
    if bitsandbytes:
        about["bitsandbytes"] = bitsandbytes.__version__
    print(json.dumps({"versions": about}), flush=True)
    cache = {}
    with torch.no_grad():
        for operation, n, k, m in asked["rows"]:
            if time.monotonic() > deadline:
                break
            if (n, k) not in cache:
                cache[n, k] = make(bitsandbytes, n, k, asked["cache_bytes"], device)
            packed, dense = cache[n, k]
            width = n if operation == "linear_transpose" else k
            x = torch.randn(m, width, dtype=torch.bfloat16, device=device)
            for name, weights, call in (
                ("cublas", dense, DENSE[operation]),
                ("bitsandbytes", packed, BITSANDBYTES[operation]),
            ):
                if not weights:
                    continue
                record = {"row": [operation, n, k, m], "name": name}
                try:
                    steps = [functools.partial(call, bitsandbytes, x, w) for w in weights]
                    record["us"], record["clock"] = microseconds(steps, asked["clock"], device)
                except Exception as error:
                    record["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                print(json.dumps(record), flush=True)


def make(bitsandbytes, n, k, cache_bytes, device):
    """(bitsandbytes' weights, dense weights), more than the cache holds of each."""

    def copies(nbytes):
        return min(MOST_COPIES, max(2, math.ceil(cache_bytes / nbytes)))

    def random():
        return torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.02

    packed = []
    if bitsandbytes:
        for _ in range(copies(n * k // 2)):
            packed.append(
                bitsandbytes.functional.quantize_4bit(
                    random(), blocksize=64, compress_statistics=True, quant_type="nf4"
                )
            )
    return packed, [random() for _ in range(copies(2 * n * k))]


# As `Linear4bit` calls it, forward and in its backward pass.
BITSANDBYTES = {
    "linear": lambda bnb, x, w: bnb.matmul_4bit(x, w[0].t(), quant_state=w[1]),
    "linear_transpose": lambda bnb, x, w: torch.matmul(
        x, bnb.functional.dequantize_4bit(*w).to(x.dtype)
    ),
}
DENSE = {
    "linear": lambda _, x, w: torch.nn.functional.linear(x, w),
    "linear_transpose": lambda _, x, w: torch.matmul(x, w),
}


def microseconds(steps, clock, device):
    """(time of a step, by which clock)."""
    for _ in range(2):
        for step in steps:
            step()
    if device == "cpu":
        return by_host(steps), "host"
    torch.cuda.synchronize()
    if clock == "profiler":
        found = by_profiler(steps)
        if found > 0:
            return found, "profiler"
    return by_events(steps), "events"


def by_host(steps):
    start = time.perf_counter()
    for step in steps:
        step()
    return (time.perf_counter() - start) * 1e6 / len(steps)


def by_profiler(steps, rounds=3):
    """Kernels' time; 0 where nothing is recorded."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(rounds):
            for step in steps:
                step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [e for e in profile.events() if e.device_type == cuda]
    total = sum(e.time_range.elapsed_us() for e in events)
    return total / (rounds * len(steps))


def by_events(steps, rounds=5):
    """CUDA events around replays of a graph; around plain calls where there can be no graph."""

    def calls():
        for step in steps:
            step()

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        run = graph.replay
    except Exception:
        torch.cuda.synchronize()
        run = calls
    times = []
    for _ in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (3 * len(steps)))
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
