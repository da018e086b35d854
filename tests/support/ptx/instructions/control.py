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


@executes("bar.sync", "barrier.sync.aligned", counts=(1,))
def barrier(machine, number):
    """Wait for all threads of the block."""
    if immediate(number, "a barrier") != 0:
        raise Unknown("a barrier other than the first")
    machine.whole(machine.block_size, "a barrier")
    machine.shared.barrier(machine.lanes[:: machine.block_size] // machine.block_size)


@executes("griddepcontrol.wait", "griddepcontrol.launch_dependents", counts=(0,))
def order_of_launches(machine):
    """Launches run one after the other here."""
