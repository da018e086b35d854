"""Loads and stores."""

import numpy as np

from tests.support.ptx.faults import Unknown
from tests.support.ptx.global_memory import BASE as GLOBAL_BASE
from tests.support.ptx.instructions.table import TABLE, executes
from tests.support.ptx.parser import Vector
from tests.support.ptx.scalar_types import TYPES, UNSIGNED, bits_of

KINDS = [*(f"{letter}{width}" for letter in "bus" for width in (8, 16, 32, 64)), "f32"]
LENGTHS = {"": 1, ".v2": 2, ".v4": 4}


def registers_of(operand, length):
    """The registers of a vector or of one element, which may stand in braces."""
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != length:
        raise Unknown(f"{len(parts)} registers for {length} elements")
    return parts


def _define(space, suffix, kind):
    length, dtype = LENGTHS[suffix], TYPES[kind]
    size = length * dtype.itemsize

    def load(machine, target, source):
        lanes = machine.lanes
        addresses = machine.address(source, lanes)
        if space == "shared":
            offsets = machine.shared.offsets(addresses, size, lanes)
            data = machine.shared.load(offsets, size, lanes)
        else:
            data = machine.memory.load(addresses, size, lanes)
        elements = data.view(dtype)
        for i, register in enumerate(registers_of(target, length)):
            value = np.zeros(machine.count, dtype)
            value[lanes] = elements[:, i]
            machine.put(register, value)

    # `.ca` says which caches keep the bytes, which changes no value.
    for cache in ("", ".ca") if space == "global" else ("",):
        executes(f"ld.{space}{cache}{suffix}.{kind}", counts=(2,))(load)

    @executes(f"st.{space}{suffix}.{kind}", counts=(2,))
    def store(machine, target, source):
        lanes = machine.lanes
        parts = registers_of(source, length)
        values = [machine.each(part, f"u{bits_of(kind)}")[lanes] for part in parts]
        data = np.stack(values, -1).astype(UNSIGNED[bits_of(kind)]).view(np.uint8)
        addresses = machine.address(target, lanes)
        if space == "shared":
            offsets = machine.shared.offsets(addresses, size, lanes)
            machine.shared.store(offsets, data, lanes)
        else:
            machine.memory.store(addresses, data, lanes)


def _define_generic(suffix, kind):
    to_global = TABLE[f"st.global{suffix}.{kind}", 2].run

    @executes(f"st{suffix}.{kind}", counts=(2,))
    def store(machine, target, source):
        """A store that names no space, to an address of global memory."""
        if (machine.address(target, machine.lanes) < GLOBAL_BASE).any():
            raise Unknown("a store to another space than global memory, which it does not name")
        to_global(machine, target, source)


for space in ("global", "shared"):
    for suffix, length in LENGTHS.items():
        for kind in KINDS:
            if length * bits_of(kind) <= 128:
                _define(space, suffix, kind)
                if space == "global":
                    _define_generic(suffix, kind)
