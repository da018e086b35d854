"""A progress bar on stderr, shown on a terminal only."""

import sys
import time
from types import TracebackType
from typing import TextIO

_WIDTH = 30
_INTERVAL = 0.1


class Progress:
    """A context manager that draws a progress bar of bytes.

    Args:
      label: text before the bar.
      total: bytes that make a full bar.
      show: whether to draw it; None: only if `file` is a terminal.
      file: text stream to draw on; None: stderr.

    Examples:
      >>> with Progress("load", 2_000_000, show=True, file=sys.stdout) as bar:
      ...     bar.add(2_000_000)
      load [##############################] 100% of 2.0 MB
    """

    def __init__(
        self, label: str, total: int, show: bool | None = None, file: TextIO | None = None
    ):
        self._file = sys.stderr if file is None else file
        self._show = self._file.isatty() if show is None else show
        self._label, self._total, self._done, self._drawn = label, total, 0, 0.0
        self._start = "\r" if self._file.isatty() else ""

    def add(self, count: int) -> None:
        """Add `count` bytes to the bar; redraw it at most every 0.1 s."""
        self._done += count
        if self._start and time.monotonic() - self._drawn > _INTERVAL:
            self._draw("")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error_type is None:
            self._done = self._total
        self._draw("\n")

    def _draw(self, end: str) -> None:
        if not self._show:
            return
        self._drawn = time.monotonic()
        share = min(1.0, self._done / self._total) if self._total else 1.0
        bar = "#" * round(share * _WIDTH)
        self._file.write(
            f"{self._start}{self._label} [{bar:<{_WIDTH}}] {share:4.0%} of {size(self._total)}{end}"
        )
        self._file.flush()


def size(count: int) -> str:
    """Return a byte count as readable text.

    >>> size(512), size(1_300_000), size(4_000_000_000)
    ('512 B', '1.3 MB', '4.0 GB')
    """
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return f"{count} B"
