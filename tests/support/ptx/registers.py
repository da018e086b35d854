"""Registers: for each name an array with the bits that every thread has in it."""

import numpy as np

from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.parser import Register
from tests.support.ptx.scalar_types import storage


class Registers:
    """The registers of `count` threads.

    Attributes:
      in_flight: names of results and of inputs of asynchronous products that are under way.
      changed: names that were written since this set was last emptied.
    """

    def __init__(self, count: int):
        self.count = count
        self.in_flight: tuple[set[str], set[str]] = (set(), set())
        self.changed: set[str] = set()
        self._values: dict[str, np.ndarray] = {}
        self._unwritten: dict[str, np.ndarray] = {}  # masks of threads, where there are any

    def get(self, register: Register, mask):
        """The bits of all threads; those in `mask` (None: all) must have written them."""
        if register.name in self.in_flight[0]:
            raise Fault(f"{register.name} of an asynchronous product is read before its wait")
        return self.get_in_flight(register, mask)

    def get_in_flight(self, register: Register, mask):
        """The same for the product that follows."""
        value = self._values.get(register.name)
        unwritten = self._unwritten.get(register.name)
        if unwritten is not None and mask is not None:
            unwritten = unwritten & mask
        if value is None or (unwritten is not None and unwritten.any()):
            raise Fault(f"{register.name} is read before it is written")
        return value

    def put(self, register: Register, value, mask) -> None:
        """Write, in the threads of `mask`; a narrow value is extended by its sign or zeros."""
        if any(register.name in names for names in self.in_flight):
            raise Fault(f"{register.name} of an asynchronous product is written before its wait")
        self.changed.add(register.name)
        self.put_in_flight(register, value, mask)

    def put_in_flight(self, register: Register, value, mask) -> None:
        """The same for a result that is not there before a wait."""
        name, dtype = register.name, storage(register.kind)
        value = np.asarray(value)
        if value.dtype != dtype:
            value = _fit(value, dtype, register)
        if mask is None:
            self._unwritten.pop(name, None)
            self._values[name] = np.broadcast_to(value, (self.count,))
            return
        old = self._values.get(name)
        if old is None:
            old, self._unwritten[name] = np.zeros(self.count, dtype), ~mask
        elif name in self._unwritten:
            self._unwritten[name] = self._unwritten[name] & ~mask
        self._values[name] = np.where(mask, value, old)


def _fit(value, dtype, register):
    if (value.dtype.kind == "b") != (dtype.kind == "b") or value.itemsize > dtype.itemsize:
        raise Unknown(f"{value.dtype} does not fit into {register.name}, .{register.kind}")
    if value.itemsize < dtype.itemsize:
        signed = np.dtype(f"i{dtype.itemsize}")
        value = value.astype(signed if value.dtype.kind == "i" else dtype)
    return value.view(dtype)
