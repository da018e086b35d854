"""JSON files, read strictly, and files that are replaced atomically."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The index of the largest models takes 10 MB.
_MAX_JSON = 100_000_000


def decode_json(text: bytes) -> Any:
    """Return the value of a JSON text; ValueError if it is malformed or repeats a key."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """Return a JSON object; ValueError, starting with `name`, for any other text."""
    try:
        value = decode_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most 100 MB.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is larger, or holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise ValueError(f"{path} has {size} bytes; JSON of up to {_MAX_JSON} is read")
    return parse_json(path.read_bytes(), str(path))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Any]:
    """Yield a binary file that replaces `path` at the end, unless an error was raised."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {name!r} is given twice")
        found[name] = value
    return found
