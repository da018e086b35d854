"""JSON, read strictly, and written as it is read."""

import json
from collections.abc import Mapping
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


def encode_json(value: Mapping[str, Any], name: str) -> bytes:
    """Return an object as indented JSON that `read_json` reads.

    Raises:
      TypeError: JSON has no such value.
      ValueError: it would be refused: it repeats a key, is nested too deeply, or takes over 100 MB.
    """
    try:
        text = (json.dumps(dict(value), indent=2) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} cannot be written as JSON: {error}") from None
    if len(text) > _MAX_JSON:
        raise ValueError(f"{name} would have {len(text)} bytes; JSON of up to {_MAX_JSON} is read")
    parse_json(text, name)
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {name!r} is given twice")
        found[name] = value
    return found
