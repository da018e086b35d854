"""The patterns of PEFT's configs, which name modules by regular expression."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Python's matcher backtracks: its time is a power of the length, of the number of repetitions.
_REPEATS, _LENGTH = 5, 200
_REPEATED_GROUP = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=")
_REPEAT = re.compile(r"(?<!\\)[*+{]")


def check_pattern(name: str, pattern: Any) -> str:
    """Return a pattern that can be matched in bounded time.

    Raises:
      ValueError: it is not a regular expression.
      NotImplementedError: its match may take very long: it repeats a group, refers back to one, or
        has many repetitions.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}: {pattern!r} is not a regular expression ({error or 'too deep'})"
        ) from None
    repeats = len(_REPEAT.findall(pattern))
    if len(pattern) > _LENGTH or repeats > _REPEATS or _REPEATED_GROUP.search(pattern):
        raise NotImplementedError(
            f"{name}: {pattern[:_LENGTH]!r} may take very long to match; patterns have up to "
            f"{_LENGTH} characters and {_REPEATS} repetitions, and repeat no group"
        )
    return str(pattern)


def lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a name or the end of its dotted parts."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    for pattern, value in patterns.items():
        # "^" matches where the name starts only, whatever the position given here.
        compiled = re.compile(pattern)
        if any(compiled.fullmatch(name, start) for start in starts):
            return value
    return default


def is_named(name: str, names: Iterable[str]) -> bool:
    """Return whether a dotted name is one of the names, or ends in one of them."""
    return any(f".{name}".endswith(f".{end}") for end in names)


def is_saved(name: str, ends: Iterable[str]) -> bool:
    """Return whether a module, or one around it, is one of PEFT's `modules_to_save`.

    PEFT compares the ends of names there, not their dotted parts: "norm" is "input_layernorm" too.
    """
    parts = name.split(".")
    around = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(module.endswith(tuple(ends)) for module in around)


def shortest(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return patterns for the names whose value is not the default.

    The last parts of the names serve as patterns where all names that end in one share a value.
    """
    by_end: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_end.setdefault(name.rpartition(".")[2], set()).add(value)
    patterns = {}
    for name, value in values.items():
        end = name.rpartition(".")[2]
        if len(by_end[end]) > 1:
            patterns[f"^{re.escape(name)}"] = value
        elif value != default:
            patterns[end] = value
    # A name's own pattern comes first, and is needed for the default too where its end has others.
    return patterns
