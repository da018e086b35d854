"""The names a caller may give as `implementation`, and how a call reaches the code behind one.

An implementation is a module or an object with four functions on arrays:

    quantize(w, *, spec) -> (packed, absmax)     codes and plain scales, in the spec's layout
    dequantize(arrays, *, spec, dtype) -> w      in the weight's full shape
    linear(x, arrays, bias, *, spec) -> y        x @ W.T + bias: [M, K] -> [M, N] in x's dtype
    transposed(g, arrays, *, spec) -> dx         g @ W: [M, N] -> [M, K] in g's dtype

and perhaps a fifth, where "xla" serves those that have none:

    compress(absmax) -> (codes, nested_absmax, offset)     double quantization of all scales

Each raises NotImplementedError, with the reason in one line, for a call it cannot serve.
"""

import functools
import importlib
from typing import Any, Literal, get_args

from jax import lax

Implementation = Literal["xla", "pallas", "pallas_interpret", "triton", "native"]

_SOURCES = {
    "xla": ("q4jax.xla.implementation", ""),
    "pallas": ("q4jax.pallas", "compiled"),
    "pallas_interpret": ("q4jax.pallas", "interpreted"),
    "pallas_where_verified": ("q4jax.pallas", "where_verified"),  # not a caller's name
    "triton": ("q4jax.triton.implementation", ""),
    "native": ("q4jax.native.implementation", "always"),
    "native_where_faster": ("q4jax.native.implementation", "where_faster"),  # not a caller's name
}
_PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("native_where_faster",),
    "cuda": ("pallas_where_verified",),
}
"""platform -> what None tries there, in this order, before "xla"."""


def resolve(implementation: str | None) -> str | None:
    """The name itself, checked; None for the best of each platform.

    Raises:
      ValueError: no such implementation.
    """
    if implementation is None:
        return None
    names = get_args(Implementation)
    if implementation not in names:
        allowed = ", ".join(map(repr, names))
        raise ValueError(f"implementation must be None or one of {allowed}; got {implementation!r}")
    return implementation


def call(implementation: str | None, operation: str, *args: Any, **static: Any) -> Any:
    """One of the operations; with None the platform is chosen when the program is lowered.

    Args:
      implementation: as `resolve` returns it.
      operation: "quantize", "compress", "dequantize", "linear" or "transposed".
      *args: pytrees of arrays, in the operation's order.
      **static: its other arguments by name.
    """
    if implementation is not None:
        return _operation(implementation, operation)(*args, **static)

    def first_of(names: tuple[str, ...], *args: Any) -> Any:
        for name in names:
            try:
                return _operation(name, operation)(*args, **static)
            except NotImplementedError:
                continue
        return _operation("xla", operation)(*args, **static)

    branches = {
        platform: functools.partial(first_of, names) for platform, names in _PREFERRED.items()
    }
    return lax.platform_dependent(*args, default=functools.partial(first_of, ()), **branches)


def _operation(name: str, operation: str) -> Any:
    module, attribute = _SOURCES[name]
    source = importlib.import_module(module)
    source = getattr(source, attribute) if attribute else source
    if operation == "compress" and not hasattr(source, operation):
        return _operation("xla", operation)
    return getattr(source, operation)
