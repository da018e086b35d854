"""`python -m q4jax`: inspect, verify and convert checkpoints."""

import logging
import sys
import warnings
from typing import Any

from q4jax.cli.main import main


def quiet() -> None:
    """Leave out what Orbax's event loop says of a failed read after `main` has named the error."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    hook = sys.unraisablehook

    def unraisable(found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            hook(found)

    sys.unraisablehook = unraisable


if __name__ == "__main__":
    quiet()
    sys.exit(main())
