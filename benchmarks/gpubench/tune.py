"""Tries tiles, and proposes a table like `q4jax/gpu/tiles.json`.

For each operation, dtype class and row of the table a few tiles are timed at M within the row, and
the fastest one that passes the check takes the row. After that come the crossovers: the largest M
at which the kernel is faster than dequantizing and a dense product. What time does not reach stays
as it was.
"""

import functools
import itertools
import json
import math
import pathlib

import jax

from gpubench import check, measure
from gpubench.goals import Row
from q4jax.gpu import tiles

TABLE = pathlib.Path(tiles.__file__).with_name("tiles.json")
CROSSOVER_MS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHARED_MEMORY = 200_000


def grid(operation, dtype_class, last_m):
    """Tiles for M up to `last_m`: those whose results and decoded weights fit the registers."""
    itemsize = 4 if dtype_class == "float32" else 2
    large = (64, 128) if itemsize == 2 else (32, 64)
    ms = (max(16, last_m),) if last_m < 128 else large
    found = []
    stages_ = (2, 4) if itemsize == 2 else (2,)
    sizes = itertools.product(ms, (32, 64, 128), (64, 128, 256), (2, 4, 8), stages_)
    for m, n, k, warps, stages in sizes:
        threads = 32 * warps
        weights = n * k // threads * itemsize // 2
        results = m * (n if operation == "linear" else k) // threads * itemsize // 2
        shared = stages * (n * k // 2 + m * (k if operation == "linear" else n) * itemsize)
        # A thread loads 32 codes at once.
        fits = 64 <= weights <= 128 and results <= 128 and shared <= _SHARED_MEMORY
        if fits and (warps >= 4 or last_m <= 32):
            found.append(tiles.Tile(m, n, k, warps, stages))
    return found


def tune(bench, table, dtype_class, broken=(), most=None, first=None):
    """Puts the rows of a dtype class into the table; a record of what was tried.

    Args:
      bench: the means.
      table: as `tiles.json` has it; it is changed.
      dtype_class: "16 bits" or "float32".
      broken: operations that a check found wrong: these stay as they are.
      most: candidates beside the present tile; None: all.
      first: rows of each operation; None: all.
    """
    record = []
    for operation in ("linear", "linear_transpose"):
        if operation in broken:
            record.append({"not tuned": f"{operation} {dtype_class}: it is wrong"})
            continue
        first_m = 1
        for row in table[operation][dtype_class][:first]:
            last_m, *sizes = row
            name = f"{operation} {dtype_class} M <= {last_m}"
            if bench.budget.spent():
                record.append({"not tuned": name})
                continue
            ms = _sample(first_m, last_m)
            now = tiles.Tile(*sizes)
            tried = list(dict.fromkeys([now, *grid(operation, dtype_class, last_m)[:most]]))
            ranked = _rank(bench, operation, dtype_class, ms, tried)
            failures = []
            for _, tile in ranked:
                wrong = _check(bench, operation, dtype_class, ms[-1], tile)
                if not wrong:
                    row[1:] = [tile.m, tile.n, tile.k, tile.warps, tile.stages]
                    break
                failures += [{"tile": str(tile), **failure} for failure in wrong]
            best = [[round(us, 2), str(tile)] for us, tile in ranked[:5]]
            before = next((round(us, 2) for us, tile in ranked if tile == now), None)
            entry = {"row": name, "measured at": list(ms), "tried": len(tried), "before": before}
            record.append({**entry, "best": best, "failures": failures})
            print(f"{name}: {row[1:]}, {best[:1]} us, before {before} us", flush=True)
            first_m = last_m + 1
    return record


def crossovers(bench, table, ms, broken=()):
    """Puts the crossovers for 16 bits into the table; a record of the ratios they follow from.

    Those for float32 stay as they are: there are no such products in full precision to lose to.
    """
    record = []
    for operation in ("linear", "linear_transpose"):
        if operation in broken:
            continue
        faster = []
        for m in ms:
            if bench.budget.spent():
                record.append({"not tuned": f"crossover of {operation} at M = {m}"})
                break
            jobs = []
            for n, k in bench.shapes:
                row = Row(operation, n, k, m)
                names = bench.kernels, measure.SEPARATE
                jobs += measure.jobs(row, names, bench.kernels, bench.weights)
            times = bench.times(jobs)
            if len(times) < len(jobs):
                record.append({"failed": [job.error for job in jobs if job.error], "m": m})
                break
            ratios = [times[i + 1] / times[i] for i in range(0, len(jobs), 2)]
            ratio = math.prod(ratios) ** (1 / len(ratios))
            faster.append(ratio > 1)
            record.append({"operation": operation, "m": m, "kernel is faster by": round(ratio, 3)})
        if faster:
            lost = faster.index(False) if False in faster else None
            last = 2**20 if lost is None else ms[lost - 1] if lost else ms[0] // 2
            table["crossover"][operation]["16 bits"] = last
            print(f"crossover of {operation}: M = {last}", flush=True)
    return record


def save(table, path):
    """Write the table as it is laid out, a tile a line, and have products take it from now on."""
    lines = [f'  "{k}": {json.dumps(table[k])},' for k in ("programs", "steps", "verified")]
    crossings = [f'    "{k}": {json.dumps(v)}' for k, v in table["crossover"].items()]
    lines.append('  "crossover": {\n' + ",\n".join(crossings) + "\n  },")
    operations = []
    for operation in ("linear", "linear_transpose"):
        classes = [
            f'    "{name}": [\n' + ",\n".join(f"      {json.dumps(r)}" for r in rows) + "\n    ]"
            for name, rows in table[operation].items()
        ]
        operations.append(f'  "{operation}": {{\n' + ",\n".join(classes) + "\n  }")
    lines.append(",\n".join(operations))
    path.write_text("{\n" + "\n".join(lines) + "\n}\n")
    tiles.use_table(table)


def _sample(first_m, last_m):
    """The M to measure at."""
    if first_m == 1:
        return (1, min(16, last_m))
    return (last_m,) if last_m <= 128 else (max(first_m, 256),)


def _rank(bench, operation, dtype_class, ms, tried):
    """[(geometric mean of microseconds, tile)], the fastest first."""
    cells = list(itertools.product(ms, bench.shapes))
    jobs = []
    for tile, (m, (n, k)) in itertools.product(tried, cells):
        row = Row(operation, n, k, m)
        [job] = measure.jobs(row, (bench.kernels,), bench.kernels, bench.weights)
        if dtype_class == "float32":
            job.x = job.x.astype("float32")
        job.operation = functools.partial(_with_tile, job.operation, tile)
        jobs.append(job)
    times = bench.times(jobs)
    ranked = []
    for number, tile in enumerate(tried):
        mine = range(number * len(cells), (number + 1) * len(cells))
        if all(i in times for i in mine):
            ranked.append((math.prod(times[i] for i in mine) ** (1 / len(cells)), tile))
    return sorted(ranked, key=lambda pair: pair[0])


def _with_tile(operation, tile, x, weight):
    with tiles.override(tile):
        return operation(x, weight)


def _check(bench, operation, dtype_class, m, tile):
    """Failures of the check with this tile: ragged, and as a layer is."""
    dtype = "float32" if dtype_class == "float32" else "bfloat16"
    m = min(m, 256)
    cases = [
        check.Case(operation, dtype=dtype, m=max(1, m - 3)),
        check.Case(operation, dtype=dtype, shape=min((1024, 2048), bench.shapes[0]), m=m),
    ]
    jax.clear_caches()  # what was traced with another tile
    return check.run(bench.kernels, cases, bench.threads, tile)["failures"]
