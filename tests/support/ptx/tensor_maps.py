"""Tensor maps, by which Hopper's copies find a box of an array, and the barriers they count on."""

import dataclasses

import numpy as np

from tests.support.ptx.faults import Fault, Unknown

MAP_BYTES = 128
_BASE = 0x0051_0000_0000  # of the parameters that hold maps; below any array
_SWIZZLED = {16: 0, 32: 1, 64: 3, 128: 7}  # bytes of a row -> which bits of an address move pieces


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A box of an array, outermost axis first.

    Attributes:
      array: the number of the array, whose start is the tensor's.
      itemsize: bytes of an element.
      sizes: elements along each axis of the tensor.
      strides: elements between neighbours along each axis; the last is 1.
      box: elements of a box.
      swizzle: the bytes of a row in shared memory whose 16-byte pieces are moved; 16: none is.
    """

    array: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self):
        row = self.box[-1] * self.itemsize
        if self.strides[-1] != 1 or any(s * self.itemsize % 16 for s in self.strides[:-1]):
            raise Fault(f"the strides of a tensor map: {self}")
        if max(self.box) > 256 or row % 16 or (self.swizzle > 16 and row > self.swizzle):
            raise Fault(f"the box of a tensor map: {self}")
        if self.swizzle not in _SWIZZLED:
            raise Unknown(f"a swizzle of {self.swizzle} bytes")

    def elements(self, first):
        """Where a box has its elements: their offsets in the array in bytes, and which exist.

        Args:
          first: the coordinates of the box's first element, outermost axis first.
        """
        offset, inside = np.zeros(self.box, np.int64), np.ones(self.box, bool)
        for axis, start in enumerate(first):
            shape = [-1 if a == axis else 1 for a in range(len(self.box))]
            at = start + np.arange(self.box[axis]).reshape(shape)
            inside &= (at >= 0) & (at < self.sizes[axis])
            offset = offset + at * self.strides[axis]
        return offset.reshape(-1) * self.itemsize, inside.reshape(-1)

    def pieces(self, start: int):
        """The addresses in shared memory of the box's pieces of 16 bytes."""
        at = start + 16 * np.arange(int(np.prod(self.box)) * self.itemsize // 16)
        return at ^ (at >> 7 & _SWIZZLED[self.swizzle]) << 4


class TensorMaps:
    """The maps of a launch, at the addresses of the parameters that hold them."""

    def __init__(self, parameters):
        self.addresses = {name: _BASE + 4096 * i for i, name in enumerate(parameters)}
        self._maps = {
            self.addresses[name] + MAP_BYTES * i: one
            for name, maps in parameters.items()
            for i, one in enumerate(maps)
        }

    def at(self, address: int) -> TensorMap:
        """The map at an address."""
        if address not in self._maps:
            raise Fault(f"no tensor map is at {address:#x}")
        return self._maps[address]


@dataclasses.dataclass
class Barrier:
    """An mbarrier of one block.

    Attributes:
      count: arrivals of a phase.
      pending: those that are missing in this one.
      bytes: that copies have still to bring in this phase; below 0 where they came early.
      phase: phases that are complete.
      ready: (epoch, thread) of its initialization, before which nobody else may use it.
      fenced: whether copies may use it.
      threads: of the block.
      arrived: the threads that have arrived in this phase.
      since: the least epoch of shared memory in which one did.
      seen: thread -> the phase in which it saw that the one before is over.
      ordered: what the block's threads did before this epoch comes before what a thread does after
        it has waited; 0 where not all of them have arrived in a phase.
    """

    count: int
    pending: int
    ready: tuple[int, int]
    threads: int
    bytes: int = 0
    phase: int = 0
    fenced: bool = False
    copies: list = dataclasses.field(default_factory=list)
    arrived: set[int] = dataclasses.field(default_factory=set)
    since: int = 0
    seen: dict[int, int] = dataclasses.field(default_factory=dict)
    ordered: int = 0

    def arrive(self, thread: int, epoch: int, bytes_: int = 0, times: int = 1) -> None:
        """A thread arrives so many times, and expects so many bytes.

        Args:
          thread: its number in the launch.
          epoch: its block's; what it did in earlier ones comes before.
          bytes_: of copies.
          times: how often it arrives.
        """
        if self.pending < times:
            raise Fault("more arrivals at an mbarrier than its phase has")
        self.since = min(self.since, epoch) if self.arrived else epoch
        self.arrived.add(thread)
        self.pending -= times
        self.bytes += bytes_
        self._complete()

    def is_over(self, thread: int, parity: int) -> bool:
        """Whether the phase of a parity is over, and the thread looks for the second time.

        Copies may take until then, longer than a wait does that has a time limit.
        """
        over = self.phase % 2 != parity
        if over and self.seen.get(thread) != self.phase:
            self.seen[thread] = self.phase
            return False
        return over

    def bring(self, offsets, size: int) -> None:
        """A copy has brought `size` bytes to each of these places."""
        self.copies.append((self.phase, offsets))
        self.bytes -= size * len(offsets)
        self._complete()

    def _complete(self) -> None:
        if not self.pending and not self.bytes:
            self.phase, self.pending = self.phase + 1, self.count
            if len(self.arrived) == self.threads:
                self.ordered = self.since
            self.arrived.clear()

    def landed(self):
        """The places of copies of complete phases, once."""
        done = [offsets for phase, offsets in self.copies if phase < self.phase]
        self.copies = [copy for copy in self.copies if copy[0] >= self.phase]
        return done
