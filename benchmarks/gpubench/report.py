"""The results as files: JSON, a table in Markdown, a plot where there is matplotlib."""

import json

from gpubench import measure

_LOUD = "**Dry run on CPU with interpreted kernels: the figures below mean nothing.**"
_COLUMNS = ("dense", "dequantize + dot", "xla", "triton", "cublas", "bitsandbytes")


def write(folder, results):
    """All of them, in `folder`; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    step = results["step"]
    (folder / f"{step}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{step}.md").write_text(table(results))
    names = [f"{step}.json", f"{step}.md"]
    if results.get("rows") and plot(folder / f"{step}.png", results):
        names.append(f"{step}.png")
    return names


def table(results):
    """Versions, what the step found, and last what failed."""
    about = results["about"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines = [f"# {about['device']}: {results['step']}", ""]
    if results["dry_run"]:
        lines += [_LOUD, ""]
    lines += [f"{about['date']}, Python {about['python']}, {versions}.", ""]
    for name, check in results.get("checks", {}).items():
        if "unavailable" in check:
            lines.append(f"- `{name}` is not available: {check['unavailable']}")
        else:
            lines.append(f"- `{name}`: {check['run']} checks, {len(check['failures'])} failed")
    lines += [f"- {tool}: {_said(found)}" for tool, found in results.get("sanitizer", {}).items()]
    if "rates" in results:
        rates = results["rates"]
        copy, bf16 = rates["copy_bytes_per_second"] / 1e12, rates["bf16_flop_per_second"] / 1e12
        lines += [f"- copy bandwidth {copy:.3f} TB/s; bf16 product {bf16:.1f} TFLOP/s"]
        clock = results["clock"]
        why = f" ({clock['reason']})" if clock["reason"] else ""
        lines += [f"- clock: {clock['kind']}{why}"]
    if "tiles" in results:
        lines.append(f"- tiles: {results['tiles']}")
    lines += [f"- {line}" for line in _tuned(results.get("tuning", []))]
    lines += [f"- {name}: {value}" for name, value in results.get("counters", {}).items()]
    if results.get("summary"):
        lines += ["", *_goal_lines(results["summary"])]
    for operation in dict.fromkeys(row["operation"] for row in results.get("rows", [])):
        lines += ["", *_row_lines(operation, results["rows"])]
    if results.get("dropped"):
        lines += ["", "Dropped for lack of time, the least important rows first:", ""]
        lines += [f"- {name}" for name in results["dropped"]]
    failures = results["failures"]
    lines += ["", f"**{len(failures)} failed**" if failures else "**Nothing failed.**"]
    lines += [f"- FAILED {f['case']}: {f['reason']}" for f in failures]
    return "\n".join(lines) + "\n"


def _said(found):
    return found.get("summary") or found.get("error") or f"not available: {found['unavailable']}"


def _tuned(record):
    """A line for each row of the tile table, and for each crossover that was measured."""
    for entry in record:
        if "best" in entry:
            best = entry["best"][0] if entry["best"] else ["nothing ran", ""]
            yield f"{entry['row']}: {best[0]} us, {best[1]}; before {entry['before']} us"
        elif "kernel is faster by" in entry:
            ratio = entry["kernel is faster by"]
            yield f"{entry['operation']} M = {entry['m']}: faster than decoding apart by {ratio}"
        else:
            yield "; ".join(f"{name}: {value}" for name, value in entry.items())


def _goal_lines(summary):
    yield "| regime | metric | cells | worst | geometric mean | floor | aim | |"
    yield "|---|---|--:|--:|--:|--:|--:|---|"
    for s in summary:
        met = "aim met" if s["floor_met"] and s["aim_met"] else "floor met"
        yield (
            f"| {s['regime']} | {s['metric']} | {s['cells']} | {s['worst']:.2f} | "
            f"{s['geometric_mean']:.2f} | {s['floor']} | {s['aim'] or ''} | "
            f"{met if s['floor_met'] else 'missed'} |"
        )


def _row_lines(operation, rows):
    mine = sorted(
        (r for r in rows if r["operation"] == operation), key=lambda r: (r["n"], r["k"], r["m"])
    )
    columns = [c for c in _COLUMNS if any(c in r["us"] for r in mine)]
    yield f"## {operation}"
    yield ""
    yield "Ratios: time of the other / time of the way taken. Above 1, q4jax is faster."
    yield ""
    heads = ["[N, K]", "M", "way", "µs", "of the floor", "of copy", *(f"x {c}" for c in columns)]
    yield "| " + " | ".join([*heads, "goals"]) + " |"
    yield "|---|--:|---|" + "--:|" * (len(heads) - 3) + "---|"
    for row in mine:
        way = row["way"]
        time = row["us"].get(way)
        ratios = [row["against"].get(c) for c in columns]
        cells = [
            f"{row['n']} x {row['k']}",
            str(row["m"] or ""),
            way,
            f"{time:.1f}" if time else "",
            f"{row['fraction_of_floor'][way]:.0%}" if time else "",
            f"{row['share_of_copy_bandwidth']:.0%}" if time else "",
            *(f"{ratio:.2f}" if ratio else "" for ratio in ratios),
            ", ".join(f"{g['metric']}: {g['verdict']}" for g in row["goals"]),
        ]
        yield "| " + " | ".join(cells) + " |"


def plot(path, results):
    """Speed against the dense product over M, a line a shape; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return False
    operations = ("linear", "linear_transpose")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, operation in zip(axes, operations, strict=True):
        lines = {}
        for row in results["rows"]:
            ratio = row["against"].get(measure.DENSE)
            if row["operation"] == operation and ratio:
                lines.setdefault((row["n"], row["k"]), []).append((row["m"], ratio))
        for (n, k), points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{n} x {k}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("M")
        axis.set_title(operation, fontsize=9)
        if lines:
            axis.legend(fontsize=7, title="[N, K]")
    axes[0].set_ylabel("time of bf16 cuBLAS / time of q4jax; higher is better")
    title = f"{results['about']['device']}, jax {results['about']['versions'].get('jax')}"
    figure.suptitle(title + (": DRY RUN, MEANS NOTHING" if results["dry_run"] else ""), fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
