"""Draw the README's picture from stored results: memory of a weight, and time of a product.

python benchmarks/plot_readme.py     # reads results/cpu.json, writes results/readme.png
"""

import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import q4jax

RESULTS = Path(__file__).parent / "results"
ROWS = (1, 4, 16, 64, 512)
# Form in cpu.json -> its label and colour.
FORMS = {
    "q4jax": ("q4jax", "#4051b5"),
    "q4jax xla": ("q4jax without its C++ kernels", "#8c9eff"),
    "qwix": ("qwix", "#f57c00"),
}


def bits_per_weight():
    """Bits a weight of a 4096 x 4096 matrix by format: codes and scales, blocks of 64."""

    def bits(nested):
        w = jnp.zeros((4096, 4096), jnp.bfloat16)
        weight = q4jax.Params4bit.quantize(w, quant_type="nf4", compress_statistics=nested)
        return 8 * weight.nbytes / w.size

    return {
        "float32": 32,
        "bfloat16": 16,
        "nf4": bits(nested=False),
        "nf4, double\nquantization": bits(nested=True),
    }


def draw_memory(axis):
    bits = bits_per_weight()
    colors = ["#bdbdbd", "#bdbdbd", "#8c9eff", "#4051b5"]
    bars = axis.barh(list(bits), list(bits.values()), color=colors, height=0.65)
    axis.bar_label(bars, [f"{value:.4g}" for value in bits.values()], padding=4)
    axis.invert_yaxis()
    axis.set(title="Bits per weight, scales included", xlim=(0, 36))
    axis.spines[["bottom", "top", "right"]].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks([])


def draw_time(axis, report):
    ratios = {(r["case"], r["form"]): r["ratio"] for r in report["results"]}
    size = report["size"]
    for form, (label, color) in FORMS.items():
        cases = [f"forward [{size}, {size}] M={rows} bfloat16" for rows in ROWS]
        times = [ratios[case, form] for case in cases]
        axis.plot(range(len(ROWS)), times, "o-", color=color, label=label, linewidth=2)
    axis.axhline(1, color="#616161", linestyle="--", linewidth=1)
    axis.annotate("dense XLA", (0, 1), (-8, -14), textcoords="offset points")
    first = ratios[f"forward [{size}, {size}] M=1 bfloat16", "q4jax"]
    axis.annotate(f"{first:.2f}", (0, first), (0, -14), textcoords="offset points", ha="center")
    axis.set(title=f"Time of x @ W.T over dense, bfloat16, {report['cpu']}, 2 cores")
    axis.set(xlabel="rows of x (one row: decoding one sequence)", ylim=(-0.1, 1.75))
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1, 1.25])
    axis.set_xticks(range(len(ROWS)), [str(rows) for rows in ROWS])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="upper left")


def main():
    report = json.loads((RESULTS / "cpu.json").read_text())
    plt.rcParams["font.size"] = 10
    plt.rcParams["axes.titlesize"] = 10.5
    figure, (memory, time) = plt.subplots(
        1, 2, figsize=(10, 3.4), layout="constrained", width_ratios=(2, 3)
    )
    draw_memory(memory)
    draw_time(time, report)
    figure.savefig(RESULTS / "readme.png", dpi=160)


if __name__ == "__main__":
    main()
