"""Shared memory of all blocks, and the order in which threads may touch it.

Memory is watched in grains: as many bytes as the kernel's smallest access. For each grain it is
known who wrote and who read it last. Two accesses of different threads, one of them a write, must
have a barrier of their block between them, in whichever order they ran here. It is `bar.sync`, or
an mbarrier at which every thread of the block has arrived and the second access's has waited; for
threads of one warp also `bar.warp.sync`.
"""

import numpy as np

from tests.support.ptx.faults import Fault

BASE = 0x400  # on hardware the first bytes belong to the system
_UNWRITTEN, _WRITTEN, _IN_FLIGHT = 0, 1, 2
_MANY = 0xFFFF_FFFF  # in place of a thread: several threads
_OF_WARP = 0x8000_0000  # the same, plus the number of the warp that has them all
WARP = 32
WARP_GROUP = 128


class SharedMemory:
    """`size` bytes for each block.

    Args:
      blocks: how many.
      threads: of a block.
      size: bytes a block may use.
      grain: the smallest access.
    """

    def __init__(self, blocks, threads, size, grain):
        self.size, self.threads, self.grain = size, threads, grain
        self.stride = -(-size // 1024) * 1024
        self.bytes = np.full(blocks * self.stride, 0xEE, np.uint8)
        grains = len(self.bytes) // grain
        self.state = np.zeros(grains, np.uint8)
        # Epoch of the block (how many barriers and arrivals it has seen, from 1) << 32, plus the
        # thread.
        self.last_write = np.zeros(grains, np.uint64)
        self.last_read = np.zeros(grains, np.uint64)
        self.epoch = np.ones(blocks, np.uint64)
        # For each thread: all accesses of its block in earlier epochs come before its next one.
        self.ordered = np.ones(blocks * threads, np.uint64)
        # The same, of all accesses of its warp; 0 where no barrier was for a warp alone.
        self.ordered_in_warp = np.zeros(blocks * threads, np.uint64)
        # For the tensor core, which reads by another way: reads under way, and what `fence.proxy`
        # has not yet made visible to it.
        self.tensor_reads = np.zeros(grains, np.int32)
        self.unfenced = np.zeros(grains, bool)

    def offsets(self, addresses, size, threads):
        """The places in `bytes` of accesses, whose addresses must be multiples of their size."""
        if (addresses % np.uint64(size)).any():
            raise Fault(f"a misaligned access to shared memory of {size} bytes")
        offsets = addresses.astype(np.int64) - BASE
        if (offsets < 0).any() or (offsets + size > self.size).any():
            raise Fault(
                f"an access outside of shared memory: {offsets.min()} to {offsets.max() + size} "
                f"of {self.size} bytes"
            )
        return offsets + threads // self.threads * self.stride

    def load(self, offsets, size, threads):
        """The bytes at each offset, [n, size]."""
        self.read(offsets, size, threads)
        return self.bytes[offsets[:, None] + np.arange(size)]

    def store(self, offsets, data, threads):
        """Write `data` [n, size]."""
        where = self._grains(offsets, data.shape[1])
        self._not_in_flight(where)
        self._write(where, threads)
        self.state[where] = _WRITTEN
        self._put(offsets, data)

    def start_copy(self, offsets, data, threads):
        """Write `data` [n, size] at some time before `end_copy`."""
        where = self._grains(offsets, data.shape[1])
        self._not_in_flight(where)
        self._write(where, threads)
        self.state[where] = _IN_FLIGHT
        self._put(offsets, data)

    def end_copy(self, offsets, size, threads):
        """The copy's bytes are those of a write that happens now."""
        where = self._grains(offsets, size)
        self._write(where, threads)
        self.state[where] = _WRITTEN

    def land(self, offsets, size):
        """The bytes of a copy that all threads of a block have waited for; none is their writer."""
        where = self._grains(offsets, size)
        self.last_write[where] = 0
        self.state[where] = _WRITTEN
        self.unfenced[where] = False

    def read(self, offsets, size, threads):
        """Check and note a read of `size` bytes at each offset."""
        where = self._grains(offsets, size)
        self._check_read(where, threads)
        self._note_read(where, threads)

    def barrier(self, blocks):
        """All threads of these blocks (their numbers) have met."""
        self.epoch[blocks] += np.uint64(1)
        self.ordered.reshape(-1, self.threads)[blocks] = self.epoch[blocks, None]

    def warp_barrier(self, threads):
        """All threads of some warps, these, have met, each warp alone."""
        self.arrival(np.unique(threads // self.threads))
        self.ordered_in_warp[threads] = self.epoch[threads // self.threads]

    def arrival(self, blocks):
        """Some threads of these blocks arrive at an mbarrier; it orders nothing they do later."""
        self.epoch[blocks] += np.uint64(1)

    def order(self, thread, epoch):
        """What all threads did before an epoch comes before what this thread does from now on."""
        self.ordered[thread] = max(self.ordered[thread], np.uint64(epoch))

    def start_tensor_read(self, offsets, size, threads):
        """The tensor core reads for the warp group of each thread until `end_tensor_read`."""
        where = self._grains(offsets, size)
        if self.unfenced[where].any():
            raise Fault("an asynchronous product reads what no fence.proxy has made visible")
        self._check_read(where, threads)
        np.add.at(self.tensor_reads, where, 1)

    def end_tensor_read(self, offsets, size, threads):
        """The group has waited; another one needs a barrier before it may write there."""
        where = self._grains(offsets, size)
        np.add.at(self.tensor_reads, where, -1)
        if self.threads > WARP_GROUP:
            self.last_read[where] = self._now(threads) | np.uint64(_MANY)

    def fence_proxy(self, threads):
        """Show the tensor core what these threads have written, or seen behind a barrier."""
        blocks = np.repeat(np.arange(len(self.epoch)), self.stride // self.grain)
        # What the block's fencing threads have seen: all before this epoch.
        seen = np.zeros(len(self.epoch), np.uint64)
        np.maximum.at(seen, threads // self.threads, self.ordered[threads])
        before = self.last_write < (seen << np.uint64(32))[blocks]
        own = np.isin(self.last_write & np.uint64(_MANY), threads.astype(np.uint64))
        self.unfenced &= ~(seen.astype(bool)[blocks] & (before | own))

    def _grains(self, offsets, size):
        """Indices [n, size / grain]."""
        return offsets[:, None] // self.grain + np.arange(max(1, size // self.grain))

    def _now(self, threads):
        """The stamps of these threads, [n, 1]."""
        epoch = self.epoch[threads // self.threads] << np.uint64(32)
        return (epoch + threads.astype(np.uint64))[:, None]

    def _others(self, last, threads):
        """Which stamps are another thread's, and not ordered before what these threads do now."""
        found = last >= (self.ordered[threads] << np.uint64(32))[:, None]
        found &= last & np.uint64(_MANY) != threads.astype(np.uint64)[:, None]
        in_warp = self.ordered_in_warp[threads]
        if in_warp.any():
            before = last < (in_warp << np.uint64(32))[:, None]
            found &= ~(before & (_warps(last) == _warps(self._now(threads))))
        return found

    def _write(self, where, threads):
        if self._others(self.last_write[where], threads).any():
            raise Fault("a race: a write over another thread's write, and no barrier between them")
        if self._others(self.last_read[where], threads).any():
            raise Fault("a race: a write over what another thread reads, and no barrier between")
        if self.tensor_reads[where].any():
            raise Fault("a write over what an asynchronous product may still read")
        self.last_write[where] = self._now(threads)
        self.unfenced[where] = True

    def _check_read(self, where, threads):
        self._not_in_flight(where)
        if (self.state[where] == _UNWRITTEN).any():
            raise Fault("a read of shared memory that nothing wrote")
        if self._others(self.last_write[where], threads).any():
            raise Fault("a race: a read of another thread's write, and no barrier between them")

    def _note_read(self, where, threads):
        last, mine = self.last_read[where], self._now(threads)
        others = self._others(last, threads)
        noted = np.where(others, _several(last, mine), mine) if others.any() else mine
        self.last_read[where] = noted
        kept = self.last_read[where]
        lost = kept != noted  # several threads read it in this instruction
        if lost.any():
            # Where threads of several warps do, what one of those wrote comes last.
            both = _several(kept, noted)[lost]
            at, order = where[lost], np.argsort(both, kind="stable")
            self.last_read[at[order]] = both[order]

    def _put(self, offsets, data):
        where = offsets[:, None] + np.arange(data.shape[1])
        self.bytes[where] = data
        if (self.bytes[where] != data).any():
            raise Fault("a race: two threads write different values to one place at once")

    def _not_in_flight(self, where):
        if (self.state[where] == _IN_FLIGHT).any():
            raise Fault("an access to bytes of an asynchronous copy before its wait")


def _warps(stamps):
    """The warp of each stamp's threads; of several warps, one that does not exist."""
    low = stamps & np.uint64(_MANY)
    return np.where(low < _OF_WARP, low // np.uint64(WARP), low - np.uint64(_OF_WARP))


def _several(stamps, others):
    """Stamps of both threads, or of more where a stamp is of several already."""
    warps = _warps(others)
    low = np.where(_warps(stamps) == warps, warps + np.uint64(_OF_WARP), np.uint64(_MANY))
    return (others & ~np.uint64(_MANY)) | low
