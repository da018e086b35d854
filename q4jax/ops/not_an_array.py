"""`NotAnArray`: says how to compute with a 4-bit weight, where it is used as an array."""

from typing import Any

_OPERATORS = """
    add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow divmod rdivmod
    matmul rmatmul and rand or ror xor rxor lshift rlshift rshift rrshift
    lt le gt ge neg pos abs invert round float int complex
    array jax_array len iter getitem setitem delitem contains
"""


class NotAnArray:
    """A description of codes and scales, whose use as an array is a TypeError with the way to go.

    A class that derives from it says the way in `_advice`. It shows no attribute of arrays, such as
    `T`, unless it defines it: then JAX and Flax would take it for one.
    """

    __slots__ = ()

    def _advice(self) -> str:
        """What it is, and what to call for an array or a product."""
        raise NotImplementedError

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        advice = "" if name.startswith("_") else f": {self._advice()}"
        raise AttributeError(f"{kind} has no attribute {name!r}{advice}", name=name, obj=self)


def _refuse(self: NotAnArray, *_: Any, **__: Any) -> Any:
    raise TypeError(self._advice())


for _name in _OPERATORS.split():
    setattr(NotAnArray, f"__{_name}__", _refuse)
