"""Ctrl-C as a request."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step.

    The second one has its usual effect. Outside of the main thread, where Python takes no signals,
    nothing changes.

    Attributes:
      asked: whether a signal came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.asked = True
        self.__exit__()
