"""A machine that counts what a launch asks of shared memory and of the L2 cache.

Shared memory has 32 banks of 4 bytes and serves one wavefront a clock: a word of each bank. A warp
is served 32 threads at a time where each asks for 4 bytes or less, 16 at 8 bytes and 8 at 16 bytes,
and each such group takes as many wavefronts as the bank with the most different words. A `wgmma`
reads its operands 128 bytes a wavefront.
"""

import numpy as np

from tests.support.ptx.global_memory import GlobalMemory
from tests.support.ptx.machine import Machine
from tests.support.ptx.shared_memory import SharedMemory

BANKS, WORD, SECTOR, WARP = 32, 4, 32, 32


def wavefronts(offsets, size, threads):
    """Of one instruction, in all warps: `offsets` in bytes, one for each of `threads`."""
    served = WARP * WORD // max(size, WORD)  # threads at once
    words = offsets[:, None] // WORD + np.arange(max(1, size // WORD))
    groups = np.broadcast_to((threads // served)[:, None], words.shape)
    pairs = np.unique(np.stack([groups.reshape(-1), words.reshape(-1)], -1), axis=0)
    _, counts = np.unique(pairs[:, 0] * BANKS + pairs[:, 1] % BANKS, return_counts=True)
    of_banks = np.unique(pairs[:, 0] * BANKS + pairs[:, 1] % BANKS) // BANKS
    most = np.zeros(of_banks.max() + 1, np.int64)
    np.maximum.at(most, of_banks, counts)
    return int(most.sum())


class CountedShared(SharedMemory):
    """Shared memory that counts wavefronts.

    Attributes:
      wavefronts: what took them -> how many: "load", "store", "copy" and "wgmma".
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.wavefronts = dict.fromkeys(("load", "store", "copy", "wgmma"), 0)

    def load(self, offsets, size, threads):
        """Count, and load."""
        self.wavefronts["load"] += wavefronts(offsets, size, threads)
        return super().load(offsets, size, threads)

    def store(self, offsets, data, threads):
        """Count, and store."""
        self.wavefronts["store"] += wavefronts(offsets, data.shape[1], threads)
        super().store(offsets, data, threads)

    def start_copy(self, offsets, data, threads):
        """Count, and start."""
        self.wavefronts["copy"] += wavefronts(offsets, data.shape[1], threads)
        super().start_copy(offsets, data, threads)

    def start_tensor_read(self, offsets, size, threads):
        """Count, and start."""
        self.wavefronts["wgmma"] += len(offsets) * size // (BANKS * WORD)
        super().start_tensor_read(offsets, size, threads)


class CountedGlobal(GlobalMemory):
    """Global memory that counts the sectors for which warps ask.

    Attributes:
      sectors: 32-byte sectors of loads; one that a warp asks for twice counts twice.
    """

    sectors = 0

    def load(self, addresses, size, threads):
        """Count, and load."""
        ends = np.concatenate([addresses // SECTOR, (addresses + np.uint64(size - 1)) // SECTOR])
        warps = np.concatenate([threads // WARP] * 2).astype(np.uint64)
        self.sectors += len(np.unique(np.stack([warps, ends], -1), axis=0))
        return super().load(addresses, size, threads)


class CountingMachine(Machine):
    """A machine whose memories count."""

    shared_memory, global_memory = CountedShared, CountedGlobal

    def counts(self):
        """Wavefronts of shared memory by what took them, and sectors of global memory."""
        return {**self.shared.wavefronts, "sectors": self.memory.sectors}
