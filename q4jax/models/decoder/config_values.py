"""Checks of the values in a `config.json`."""

from collections.abc import Mapping
from typing import Any

# The largest index in int32.
_LARGEST = 2**31 - 1
# Bounds that leave room for products in float32.
_MIN_NUMBER, _MAX_NUMBER = 1e-30, 1e30


def size(name: str, value: Any) -> int:
    """Return a positive integer; ValueError for any other value."""
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def number(name: str, value: Any) -> float:
    """Return a number from 1e-30 to 1e30 as float; ValueError for any other value."""
    if type(value) not in (int, float) or not _MIN_NUMBER <= value <= _MAX_NUMBER:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return a boolean; ValueError for any other value."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def require(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise NotImplementedError unless an entry has one of the values that are served."""
    if value not in allowed:
        raise NotImplementedError(f"{key}={value!r}: q4jax implements {key}={allowed[0]!r}")


CHECKS: Mapping[Any, Any] = {int: size, float: number, bool: flag}
"""Type of a config field -> its check."""
