"""Values of a `config.json`, each checked to be what it must be."""

from collections.abc import Mapping
from typing import Any

# The largest size of anything: what int32 indices reach.
_LARGEST = 2**31 - 1
_MAX_NUMBER = 1e30


def size(name: str, value: Any) -> int:
    """A positive integer; ValueError otherwise."""
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def number(name: str, value: Any) -> float:
    """A positive number; ValueError otherwise."""
    if type(value) not in (int, float) or not 0 < value <= _MAX_NUMBER:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """A boolean; ValueError otherwise."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


CHECKS: Mapping[Any, Any] = {int: size, float: number, bool: flag}
"""The check of each type of a field."""
