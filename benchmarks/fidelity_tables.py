"""The tables and the picture of docs/fidelity.md, from benchmarks/results/fidelity.json.

python benchmarks/fidelity_tables.py      # prints every passage that has a figure in it
"""

import json
import pathlib
import re

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results" / "fidelity.json"
# Name -> quant_type, double quantization.
SCHEMES = {
    "nf4": ("nf4", False),
    "nf4+dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4+dq": ("fp4", True),
}


def kind(record):
    """A record's weight without the number of its layer: "self_attn.q_proj"."""
    return re.sub(r".*layers?\.\d+\.|\.weight$|attention\.self\.|\.dense", "", record["weight"])


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values):
    """Mean, and the extremes."""
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def error_table(records):
    """A row for each kind of weight, over the layers; then all of them."""
    rows = []
    for name in [*dict.fromkeys(map(kind, records)), "all"]:
        chosen = [r for r in records if name in (kind(r), "all")]
        errors = [spread([r["errors"][scheme] for r in chosen]) for scheme in SCHEMES]
        rows.append([name if name == "all" else f"`{name}`", len(chosen), *errors])
    return markdown(["weight", "layers", *SCHEMES], rows)


def perplexity_table(records):
    """A row for each blocksize: nf4 with and without double quantization, and their ratio."""
    found = {(r["scheme"], r["blocksize"]): r for r in records}
    rows = []
    for blocksize in dict.fromkeys(b for _, b in found if b):
        plain, nested = found["nf4", blocksize], found["nf4+dq", blocksize]
        change = 100 * (nested["perplexity"] / plain["perplexity"] - 1)
        numbers = [f"{r[key]:.{d}f}" for r in (plain, nested) for key, d in _COLUMNS]
        rows.append([blocksize, *numbers, f"{change:+.2f}%"])
    header = ["blocksize", "nf4", "bits", "nf4+dq", "bits", "change by dq"]
    return markdown(header, rows)


_COLUMNS = (("perplexity", 2), ("bits", 3))


def sentences(results):
    """The figures of the text: name to sentence."""
    found = {(r["scheme"], r["blocksize"]): r["perplexity"] for r in results["perplexity"]}
    blocksizes = sorted(b for scheme, b in found if scheme == "nf4")
    worst = max(abs(found["nf4+dq", b] / found["nf4", b] - 1) for b in blocksizes)
    layers = [r for r in results["layers"] if r["model"] != "normal"]
    added = max(r["errors"]["nf4+dq"] / r["errors"]["nf4"] - 1 for r in layers)
    normal = next(r["errors"] for r in results["layers"] if r["model"] == "normal")
    return {
        "nested": f"Double quantization moves nf4's perplexity by at most {100 * worst:.2f}%",
        "added": f"it adds at most {100 * added:.2f}% to the error of any layer",
        "normal": f"{normal['nf4']:.4f} in nf4 and {normal['fp4']:.4f} in fp4",
        "dense": f"as the file has it, its perplexity is {found[None, None]:.2f}",
        "fp4": f"fp4 at blocksize 64 has {found['fp4', 64]:.2f}, and {found['fp4+dq', 64]:.2f} "
        "with double quantization",
        "tokens": f"{results['tokens']:,} tokens",
        "versions": f"Python {results['python']}, jax {results['jax']}",
    }


def tables(results):
    """Every passage of docs/fidelity.md that has a figure in it, by name."""
    models = {r["model"]: [] for r in results["layers"]}
    for record in results["layers"]:
        models[record["model"]].append(record)
    return {
        "MiniLM": error_table(models["MiniLM"]),
        "SmolLM2": error_table(models["SmolLM2"]),
        "perplexity": perplexity_table(results["perplexity"]),
        **sentences(results),
    }


def plot(results, path):
    """Errors by layer of both models, and perplexity against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, model in zip(axes, ("MiniLM", "SmolLM2"), strict=False):
        records = [r for r in results["layers"] if r["model"] == model]
        for scheme, style in zip(SCHEMES, ("C0o", "C1x", "C2o", "C3x"), strict=True):
            axis.plot([r["errors"][scheme] for r in records], style, markersize=4, label=scheme)
        axis.set(title=model, xlabel="weights, first layer to last", ylabel="relative error")
        axis.legend()
    for scheme in ("nf4", "nf4+dq"):
        chosen = [r for r in results["perplexity"] if r["scheme"] == scheme]
        axes[2].plot(
            [r["bits"] for r in chosen], [r["perplexity"] for r in chosen], "o-", label=scheme
        )
    axes[2].axhline(
        results["perplexity"][0]["perplexity"], ls="--", color="gray", label="as stored"
    )
    axes[2].set(title="SmolLM2, blocksize 4096 to 64", xlabel="bits per weight")
    axes[2].set_ylabel("held-out perplexity")
    axes[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    for passage in tables(json.loads(RESULTS.read_text())).values():
        print(passage, end="\n\n")
