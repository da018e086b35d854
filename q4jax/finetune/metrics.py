"""Where the numbers of a run go: its log, TensorBoard, and a line on the terminal."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax

from q4jax.finetune.folder import RunFolder
from q4jax.finetune.requirements import require
from q4jax.interop.progress import size

_INTERVAL = 10.0  # seconds between lines where there is no terminal


class Metrics:
    """Records numbers by step.

    Args:
      folder: that of the run.
      tensorboard: whether to write them for TensorBoard too.

    Raises:
      SettingsError: tensorboardX is not installed.
    """

    def __init__(self, folder: RunFolder, tensorboard: bool):
        self._folder = folder
        self._writer: Any = None
        if tensorboard:
            package = require("tensorboardX", "tensorboard", "--tensorboard")
            self._writer = package.SummaryWriter(str(folder.tensorboard))

    def record(self, step: int, **values: float) -> None:
        """Record values of a step."""
        self._folder.record({"step": step, **values})
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()


class ProgressLine:
    """One line that tells where a run is: redrawn on a terminal, else printed now and then.

    Args:
      steps: the steps of the whole run.
      first: the steps that were done before.
      file: text stream to write to; None: stderr.
    """

    def __init__(self, steps: int, first: int = 0, file: TextIO | None = None):
        self._file = sys.stderr if file is None else file
        self._steps, self._first = steps, first
        self._began = self._shown = time.monotonic()
        self._smooth: float | None = None

    def show(self, step: int, loss: float, speed: float) -> None:
        """Show a step's loss, smoothed, and its speed in tokens a second."""
        self._smooth = loss if self._smooth is None else 0.9 * self._smooth + 0.1 * loss
        now, live = time.monotonic(), self._file.isatty()
        if not live and now - self._shown < _INTERVAL and self._first + 1 < step < self._steps:
            return
        self._shown = now
        left = (now - self._began) / (step - self._first) * (self._steps - step)
        text = (
            f"step {step}/{self._steps}  loss {self._smooth:.3f}  {speed:,.0f} tokens/s  "
            f"memory {size(peak_bytes())}  {clock(left)} left"
        )
        self._file.write(f"\r{text:<79}" if live else f"{text}\n")
        if live and step == self._steps:
            self._file.write("\n")
        self._file.flush()

    def say(self, text: str) -> None:
        """Write a line of its own."""
        self._file.write(f"\r{text:<79}\n" if self._file.isatty() else f"{text}\n")
        self._file.flush()


def peak_bytes() -> int:
    """Return the largest memory that was in use: of the first device, or of the process."""
    device: Mapping[str, int] = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        return device["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def clock(seconds: float) -> str:
    """Return a time as text.

    >>> clock(59.6), clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
