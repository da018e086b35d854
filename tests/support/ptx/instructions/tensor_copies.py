"""Copies of boxes of arrays to shared memory (Hopper), and the barriers that wait for their bytes.

A copy is done when it starts; its bytes may be touched after a wait for the barrier that counts
them, for which all threads of a block wait together. A part of them may wait for arrivals alone.
"""

import numpy as np

from tests.support.ptx.faults import Fault
from tests.support.ptx.instructions.loads import registers_of
from tests.support.ptx.instructions.table import executes
from tests.support.ptx.tensor_maps import Barrier


def _places(machine, operand):
    """(thread, block, place in shared memory) of the barrier that each thread names."""
    lanes = machine.lanes
    offsets = machine.shared.offsets(machine.address(operand, lanes), 8, lanes)
    return list(
        zip(lanes.tolist(), (lanes // machine.block_size).tolist(), offsets.tolist(), strict=True)
    )


def _barrier(machine, lane, block, place) -> Barrier:
    barrier = machine.barriers.get(place)
    if barrier is None:
        raise Fault("an mbarrier that was not initialized")
    epoch, owner = barrier.ready
    if epoch >= machine.shared.ordered[lane] and owner != lane:
        raise Fault("a race: an mbarrier that another thread initialized, and no barrier between")
    return barrier


@executes("mbarrier.init.shared.b64", counts=(2,))
def initialize(machine, barrier, count):
    """A barrier of so many arrivals."""
    counts = machine.each(count, "u32")
    for lane, block, place in _places(machine, barrier):
        if place in machine.barriers:
            raise Fault("an mbarrier is initialized a second time")
        n = int(counts[lane])
        ready = int(machine.shared.epoch[block]), lane
        machine.barriers[place] = Barrier(n, n, ready, machine.block_size)


@executes("fence.mbarrier_init.release.cluster", counts=(0,))
def fence_initialization(machine):
    """Show copies the barriers that these threads have initialized."""
    lanes = set(machine.lanes.tolist())
    for barrier in machine.barriers.values():
        barrier.fenced |= barrier.ready[1] in lanes


@executes(
    "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64",
    "mbarrier.arrive.expect_tx.shared.b64",
    counts=(3,),
)
def arrive(machine, state, barrier, expected):
    """Arrive, and expect bytes of copies in this phase.

    The result is the phase's state, for which no instruction that is known here has any use.
    """
    machine.put(state, np.uint64(0))
    expected = machine.each(expected, "u32")
    for one, lane, epoch in _arrivals(machine, barrier):
        one.arrive(lane, epoch, bytes_=int(expected[lane]))


@executes("mbarrier.arrive.release.cta.shared::cta.b64", counts=(3,))
def arrive_so_often(machine, state, barrier, times):
    """Arrive, as one thread or as several."""
    machine.put(state, np.uint64(0))
    times = machine.each(times, "u32")
    for one, lane, epoch in _arrivals(machine, barrier):
        one.arrive(lane, epoch, times=int(times[lane]))


def _arrivals(machine, operand):
    """(barrier, thread, epoch from which on it does what comes after its arrival)."""
    found = [(_barrier(machine, *place), *place[:2]) for place in _places(machine, operand)]
    machine.shared.arrival(np.unique([block for _, _, block in found]))
    return [(one, lane, int(machine.shared.epoch[block])) for one, lane, block in found]


@executes("mbarrier.try_wait.parity.shared.b64", counts=(3, 4))
def wait(machine, done, barrier, parity, limit=None):
    """Whether the phase of a parity is complete; its copies' bytes may then be touched.

    The time limit changes nothing: at a thread's first look it has always passed.
    """
    del limit
    parity = machine.each(parity, "u32")
    if (parity[machine.lanes] > 1).any():
        raise Fault("a parity that is neither 0 nor 1")
    complete = np.zeros(machine.count, bool)
    for lane, block, place in _places(machine, barrier):
        one = _barrier(machine, lane, block, place)
        complete[lane] = one.is_over(lane, int(parity[lane]))
        if complete[lane]:
            machine.shared.order(lane, one.ordered)
            for offsets in one.landed():
                machine.whole(machine.block_size, "a wait for copies")
                machine.shared.land(offsets, 16)
    machine.put(done, complete)


@executes("prefetch.tensormap", counts=(1,))
def prefetch(machine, operand):
    """No effect on results; the map must be there."""
    for address in np.unique(machine.address(operand, machine.lanes)):
        machine.tensor_maps.at(int(address))


def _define(rank):
    # A launch has no clusters here, and a block is one of its own.
    @executes(
        f"cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes",
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes",
        counts=(3,),
    )
    def copy(machine, target, source, barrier):
        """Copy a box, zeros where it is outside of its tensor. Coordinates are innermost first."""
        operand, coordinates = registers_of(source, 2)
        lanes = machine.lanes
        maps, starts = (machine.address(o, lanes) for o in (operand, target))
        first = [machine.each(c, "s32")[lanes] for c in registers_of(coordinates, rank)]
        for i, (lane, block, place) in enumerate(_places(machine, barrier)):
            one = _barrier(machine, lane, block, place)
            if not one.fenced:
                raise Fault("a copy to an mbarrier whose initialization was not fenced")
            box = machine.tensor_maps.at(int(maps[i]))
            if len(box.box) != rank or starts[i] % 128:
                raise Fault(f"a copy of rank {rank} to {starts[i]:#x} by {box}")
            _copy(machine, lane, box, [int(c[i]) for c in reversed(first)], int(starts[i]), one)


def _copy(machine, lane, box, first, start, barrier):
    offsets, inside = box.elements(first)
    data = np.zeros((len(offsets), box.itemsize), np.uint8)
    addresses = np.uint64(machine.memory.address(machine.constants + box.array))
    if addresses % np.uint64(16):
        raise Fault("a tensor that does not start at 16 bytes")
    threads = np.full(int(inside.sum()), lane)
    data[inside] = machine.memory.load(
        addresses + offsets[inside].astype(np.uint64), box.itemsize, threads
    )
    data = data.reshape(-1, 16)
    pieces = box.pieces(start).astype(np.uint64)
    threads = np.full(len(pieces), lane)
    places = machine.shared.offsets(pieces, 16, threads)
    machine.shared.start_copy(places, data, threads)
    barrier.bring(places, 16)


for rank in range(1, 6):
    _define(rank)
