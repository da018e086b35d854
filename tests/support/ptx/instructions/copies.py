"""Asynchronous copies from global to shared memory, `cp.async`."""

import numpy as np

from tests.support.ptx.faults import Unknown
from tests.support.ptx.instructions.moves import immediate
from tests.support.ptx.instructions.table import executes
from tests.support.ptx.parser import Register


def _copy(machine, target, source, size, sizes, choice):
    """Copy `size` bytes a thread, or zeros where `choice` says so."""
    size = immediate(size, "a size")
    if size not in sizes:
        raise Unknown(f"a copy of {size} bytes")
    lanes = machine.lanes
    reads = _reads(machine, choice, size, lanes)
    data = np.zeros((len(lanes), size), np.uint8)
    if reads.any():
        addresses = machine.address(source, lanes)[reads]
        data[reads] = machine.memory.load(addresses, size, lanes[reads])
    offsets = machine.shared.offsets(machine.address(target, lanes), size, lanes)
    machine.shared.start_copy(offsets, data, lanes)
    machine.copies.start(lanes, offsets, size)


def _reads(machine, choice, size, lanes):
    """Which threads read: by a predicate to ignore the source, or by the number of its bytes."""
    if choice is None:
        return np.ones(len(lanes), bool)
    if isinstance(choice, Register) and choice.kind == "pred":
        return ~machine.each(choice, "pred")[lanes]
    count = machine.each(choice, "u32")[lanes]
    if not np.isin(count, (0, size)).all():
        raise Unknown("a copy of a part, filled up with zeros")
    return count > 0


@executes("cp.async.ca.shared.global", counts=(3, 4))
def copy_through_all_caches(machine, target, source, size, choice=None):
    """Copy 4, 8 or 16 bytes."""
    _copy(machine, target, source, size, (4, 8, 16), choice)


@executes("cp.async.cg.shared.global", counts=(3, 4))
def copy_through_l2(machine, target, source, size, choice=None):
    """Copy 16 bytes."""
    _copy(machine, target, source, size, (16,), choice)


@executes("cp.async.commit_group", counts=(0,))
def commit(machine):
    """Close a group."""
    machine.copies.commit(machine.lanes)


@executes("cp.async.wait_group", counts=(1,))
def wait(machine, keep):
    """Wait until at most `keep` groups are under way; what they wrote is then the thread's own."""
    for copy in machine.copies.wait(machine.lanes, immediate(keep, "a number of groups")):
        machine.shared.end_copy(copy.offsets, copy.size, copy.threads)


@executes("cp.async.wait_all", counts=(0,))
def wait_for_all(machine):
    """Wait for all copies, in groups or not."""
    machine.copies.commit(machine.lanes)
    for copy in machine.copies.wait(machine.lanes, 0):
        machine.shared.end_copy(copy.offsets, copy.size, copy.threads)
