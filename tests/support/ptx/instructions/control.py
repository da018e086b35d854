"""Branches, ends, barriers, and what has no effect on results."""

from tests.support.ptx.faults import Unknown
from tests.support.ptx.instructions.moves import immediate
from tests.support.ptx.instructions.table import Jump, executes


@executes("bra", "bra.uni", counts=(1,))
def branch(machine, label):
    """Go to a label."""
    if label.name not in machine.kernel.labels:
        raise Unknown(f"the label {label.name}")
    return Jump(label.name)


@executes("ret", "exit", counts=(0,))
def end(machine):
    """End the thread."""
    return Jump(None)


@executes("bar.sync", "barrier.sync.aligned", counts=(1, 2))
def barrier(machine, number, threads=None):
    """Wait for all threads of the block.

    Of its barriers any will do, since none is ever waited for by a part of the threads.
    """
    numbers = machine.each(number, "u32")[machine.lanes]
    if (numbers != numbers[0]).any() or numbers[0] > 15:
        raise Unknown("different barriers, or more than 16")
    if threads is not None and immediate(threads, "a number") != machine.block_size:
        raise Unknown("a barrier of a part of the block")
    machine.whole(machine.block_size, "a barrier")
    machine.shared.barrier(machine.lanes[:: machine.block_size] // machine.block_size)


@executes("griddepcontrol.wait", "griddepcontrol.launch_dependents", counts=(0,))
def order_of_launches(machine):
    """Launches run one after the other here."""
