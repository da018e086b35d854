"""Checks of the values in a `config.json`."""

from collections.abc import Mapping
from typing import Any

# The largest index in int32.
_LARGEST = 2**31 - 1
_MAX_NUMBER = 1e30


def size(name: str, value: Any) -> int:
    """Return a positive integer; ValueError for any other value."""
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def number(name: str, value: Any) -> float:
    """Return a positive number as float; ValueError for any other value."""
    if type(value) not in (int, float) or not 0 < value <= _MAX_NUMBER:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return a boolean; ValueError for any other value."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


CHECKS: Mapping[Any, Any] = {int: size, float: number, bool: flag}
"""Type of a config field -> its check."""
