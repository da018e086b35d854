"""The picture of a run: training loss, smoothed, and held-out loss beside it."""

from collections.abc import Mapping
from pathlib import Path

History = list[tuple[int, float]]


def draw(path: Path, training: History, held_out: History, lines: Mapping[str, float]) -> bool:
    """Draw losses by step into a PNG; return False if matplotlib is not installed.

    Args:
      path: the file.
      training: (step, loss) of each step, at least one.
      held_out: (step, loss) of each evaluation, or none.
      lines: losses that do not depend on a step, by name.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    steps, losses = zip(*training, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="training")
    axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    for name, value in lines.items():
        axes.axhline(value, color="gray", linestyle="--", label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def smoothed(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Return means that fade out, without the pull of a start at zero.

    >>> smoothed((2.0, 2.0, 2.0))
    [2.0, 2.0, 2.0]
    """
    total, count, found = 0.0, 0.0, []
    for value in values:
        total, count = weight * total + value, weight * count + 1
        found.append(total / count)
    return found
