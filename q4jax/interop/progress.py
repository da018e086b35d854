"""A progress bar, where somebody looks."""

import sys
import time
from types import TracebackType
from typing import TextIO

_WIDTH = 30
_INTERVAL = 0.1


class Progress:
    """A bar on stderr that grows with bytes; a context manager.

    Args:
      label: what is being done.
      total: bytes at its end.
      show: None: where stderr is a terminal.
      file: None: stderr.

    Example:
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
        """Counts bytes, and draws now and then."""
        self._done += count
        if self._start and time.monotonic() - self._drawn > _INTERVAL:
            self._draw("")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
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
    """Bytes, for people.

    >>> size(512), size(1_300_000), size(4_000_000_000)
    ('512 B', '1.3 MB', '4.0 GB')
    """
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return f"{count} B"
