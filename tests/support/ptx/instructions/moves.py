"""Moves, packing and unpacking, and addresses of parameters and variables."""

import numpy as np

from tests.support.ptx.faults import Unknown
from tests.support.ptx.instructions.table import define, executes
from tests.support.ptx.parser import Immediate, Register, Symbol, Vector
from tests.support.ptx.scalar_types import TYPES, bits_of


def _define_move(kind):
    @executes(f"mov.{kind}", counts=(2,))
    def move(machine, target, source):
        width = bits_of(kind)
        if isinstance(target, Vector):  # the lowest bits to the first register
            value = np.asarray(machine.get(source, kind))
            part = width // len(target.parts)
            for i, register in enumerate(target.parts):
                piece = value >> value.dtype.type(i * part)
                machine.put(register, piece.astype(TYPES[f"u{part}"]))
        elif isinstance(source, Vector):
            part = width // len(source.parts)
            value = TYPES[kind].type(0)
            for i, operand in enumerate(source.parts):
                piece = np.asarray(machine.get(operand, f"u{part}")).astype(TYPES[kind])
                value = value | piece << TYPES[kind].type(i * part)
            machine.put(target, value)
        else:
            for operand in (target, source):
                if isinstance(operand, Register) and bits_of(operand.kind) != width:
                    raise Unknown(f"{operand.name} is .{operand.kind}")
            machine.put(target, machine.get(source, kind))


for kind in ("pred", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64"):
    _define_move(kind)

for to in ("to.global", "param"):
    define(f"cvta.{to}.u64", "u64 = u64", lambda address: address)


def _load_parameter(dtype):
    def load(machine, target, source):
        """Parameters are addresses of arrays or scalars, so there is nothing to load them from."""
        if not isinstance(source.base, Symbol) or source.offset:
            raise Unknown("a part of a parameter")
        machine.put(target, dtype(machine.addresses[source.base.name]))

    return load


executes("ld.param.b64", "ld.param.u64", "ld.param::entry.b64", counts=(2,))(
    _load_parameter(np.uint64)
)
executes("ld.param.b32", counts=(2,))(_load_parameter(np.uint32))


def immediate(operand, what: str) -> int:
    """The value of an operand that must be a constant."""
    if not isinstance(operand, Immediate):
        raise Unknown(f"{what} that is no constant")
    return operand.value
