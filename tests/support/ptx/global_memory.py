"""Global memory: arrays with nothing between them, each either read or written."""

import numpy as np

from tests.support.ptx.faults import Fault

BASE = 0x7F30_0000_0000  # so high that an address that was cut to 32 bits is noticed
_GAP = 4096
_READABLE, _WRITABLE = 1, 2


class GlobalMemory:
    """The operands, initialized, and the results, which hold nothing yet.

    Args:
      operands: arrays that may be read.
      results: arrays for whose shape and dtype there is room that may be written.
      alignments: the bytes to which each one's address is a multiple, and no larger power of two.
    """

    def __init__(self, operands, results, alignments):
        arrays = [*operands, *results]
        self.offsets, end = [], _GAP
        for array, alignment in zip(arrays, alignments, strict=True):
            at = -(-end // (2 * alignment)) * 2 * alignment + alignment
            self.offsets.append(at)
            end = at + array.nbytes + _GAP
        self.results = list(zip(self.offsets[len(operands) :], results, strict=True))
        self.bytes = np.full(end, 0xA5, np.uint8)
        self.permission = np.zeros(end, np.uint8)
        self.writer = np.full(end, -1, np.int32)
        for i, (at, array) in enumerate(zip(self.offsets, arrays, strict=True)):
            where = slice(at, at + array.nbytes)
            self.permission[where] = _READABLE if i < len(operands) else _WRITABLE
            if i < len(operands):
                self.bytes[where] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def address(self, number):
        """Where an array starts."""
        return BASE + self.offsets[number]

    def load(self, addresses, size, threads):
        """The bytes at each thread's address, [n, size]."""
        del threads
        return self.bytes[self._check(addresses, size, _READABLE)]

    def store(self, addresses, data, threads):
        """Write `data` [n, size]; no byte may be another thread's."""
        where = self._check(addresses, data.shape[1], _WRITABLE)
        owner = np.broadcast_to(threads[:, None], where.shape)
        written = (self.writer[where] >= 0) & (self.writer[where] != owner)
        self.writer[where] = owner
        self._check_owners(where, data, written, self.writer[where] != owner)
        self.bytes[where] = data

    def _check_owners(self, where, data, written, lost):
        """Refuse bytes that another thread has `written`, or writes now, so that one is `lost`."""
        del where, data
        if written.any() or lost.any():
            raise Fault("two threads write the same byte of a result")

    def result(self, number):
        """A result, of which every byte must have been written."""
        at, array = self.results[number]
        where = slice(at, at + array.nbytes)
        missing = np.flatnonzero(self.writer[where] < 0)
        if len(missing):
            first = missing[0]
            raise Fault(
                f"{len(missing)} bytes of result {number} are not written, the first at {first}"
            )
        return self.bytes[where].view(array.dtype).reshape(array.shape)

    def _check(self, addresses, size, permission):
        """Indices [n, size] of the accessed bytes."""
        offsets = addresses.astype(np.int64) - BASE
        if (addresses % np.uint64(size)).any():
            raise Fault(f"a misaligned access of {size} bytes")
        where = offsets[:, None] + np.arange(size)
        inside = (where >= 0) & (where < len(self.bytes))
        if not inside.all() or (self.permission[where] != permission).any():
            allowed = self.permission[np.where(inside, where, 0)] == permission
            first = int(addresses[np.flatnonzero(~(inside & allowed).all(1))[0]])
            number = max(np.searchsorted(self.offsets, first - BASE, "right") - 1, 0)
            access = "read" if permission == _READABLE else "write"
            raise Fault(
                f"a {access} of {size} bytes outside, at {first - self.address(number)} of array "
                f"{number}"
            )
        return where


class OverlappingResults(GlobalMemory):
    """Takes one byte of a result from two threads where both write the same value."""

    def _check_owners(self, where, data, written, lost):
        before = self.bytes[where]
        self.bytes[where] = data
        after = self.bytes[where]
        if (written & (before != data)).any() or (lost & (after != data)).any():
            raise Fault("two threads write other values to the same byte of a result")
