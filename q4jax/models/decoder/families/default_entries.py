"""The entries that a `config.json` may leave out, with the values that transformers gives them.

`defaults.json` holds them by `model_type`; `tests/models/vectors/make_defaults.py` writes it.
"""

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("defaults.json").read_text()
    )
    return found


def default_entries(model_type: str) -> dict[str, Any]:
    """Return the default entries of a family."""
    return _table().get(model_type, {})
