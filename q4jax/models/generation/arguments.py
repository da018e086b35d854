"""Checks of the arguments of `generate`: Python's, NumPy's and JAX's scalars alike."""

import operator
from typing import Any

import jax
import numpy as np


def integer(name: str, value: Any, low: float, high: float, allowed: str) -> int:
    """Return an integer from `low` to `high`; ValueError, with what is allowed, for other values.

    >>> integer("top_k", np.int64(3), 0, 10, "from 0 to 10")
    3
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}") from None
    if not low <= found <= high:
        raise ValueError(f"{name} must be {allowed}, got {found}")
    return found


def number(name: str, value: Any) -> float:
    """Return a number as float, NaN included; ValueError for other values.

    >>> number("temperature", np.float32(0.5))
    0.5
    """
    try:
        if isinstance(value, str | bytes | bool | np.bool_) or np.ndim(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def token_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Return tokens, given one or several, as a tuple; ValueError if one is not in the vocabulary.

    >>> token_ids("eos_token_id", np.array([3, 1]), 10)
    (3, 1)
    """
    several = np.ndim(value) if hasattr(value, "ndim") else hasattr(value, "__iter__")
    allowed = f"from 0 to vocab_size-1={vocab_size - 1}"
    given = value if several else (value,)
    return tuple(integer(name, token, 0, vocab_size - 1, allowed) for token in given)


def random_key(name: str, value: Any) -> jax.Array:
    """Return one JAX random key of either style; ValueError for other values."""
    try:
        jax.eval_shape(lambda key: jax.random.fold_in(key, 0), value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be one JAX random key, as jax.random.key(0), got {value!r}"
        ) from None
    key: jax.Array = value
    return key
