"""The text of a mesh, such as `fsdp=4,tensor=2`."""

import re

from q4jax.models.decoder.shardings import AXES

_TEXT = re.compile(r"[a-z]+=[1-9][0-9]*(,[a-z]+=[1-9][0-9]*)*")


def sizes(text: str) -> dict[str, int]:
    """Return the sizes of a mesh's axes by name.

    Raises:
      ValueError: the text is malformed, or names an axis twice or one that is not known.

    Examples:
      >>> sizes("fsdp=4,tensor=2")
      {'fsdp': 4, 'tensor': 2}
    """
    if not _TEXT.fullmatch(text):
        raise ValueError(f"must be like fsdp=4,tensor=2, got {text!r}")
    pairs = [part.split("=") for part in text.split(",")]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"names an axis twice: {text!r}")
    if unknown := dict(pairs).keys() - set(AXES):
        raise ValueError(f"has axes among {', '.join(AXES)}, got {sorted(unknown)}")
    return {name: int(size) for name, size in pairs}
