"""The names a caller may give as `implementation`, and which of them can serve."""

from typing import Literal, get_args

Implementation = Literal["xla", "pallas", "pallas_interpret", "triton", "native"]
_AVAILABLE = ("xla",)


def resolve(implementation: str | None) -> str:
    """The implementation that serves a call; None takes the best for the platform.

    Raises:
      ValueError: no such implementation.
      NotImplementedError: one that this version cannot run.
    """
    if implementation is None:
        return _AVAILABLE[0]
    if implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation must be None or one of {allowed}; got {implementation!r}")
    if implementation not in _AVAILABLE:
        raise NotImplementedError(
            f"implementation={implementation!r} is not part of this version; "
            f"it has {', '.join(map(repr, _AVAILABLE))}"
        )
    return implementation
