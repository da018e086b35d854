"""The table of instructions, by the whole opcode, modifiers included, and the operands' number."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tests.support.ptx.faults import Unknown
from tests.support.ptx.parser import Instruction, Register
from tests.support.ptx.scalar_types import bits_of


@dataclasses.dataclass(frozen=True)
class Jump:
    """What an instruction returns that goes to a label, or ends the thread (None)."""

    label: str | None


@dataclasses.dataclass(frozen=True)
class Definition:
    """An instruction.

    Attributes:
      run: a function of the machine and the operands.
      kinds: the type of each operand where they are plain values, else ().
    """

    run: Callable[..., Any]
    kinds: tuple[str, ...] = ()


TABLE: dict[tuple[str, int], Definition] = {}


def define(opcode: str, signature: str, function: Callable[..., Any]) -> None:
    """Add an instruction that computes a result of each thread's own values.

    Args:
      opcode: all of it.
      signature: the types, as "s32 = s32 s32".
      function: of numpy arrays or scalars of these types.
    """
    result, _, *sources = signature.split()

    def run(machine, target, *operands):
        values = [machine.get(o, kind) for o, kind in zip(operands, sources, strict=True)]
        machine.put(target, function(*values))

    TABLE[opcode, 1 + len(sources)] = Definition(run, (result, *sources))


def executes(*opcodes: str, counts: tuple[int, ...]) -> Callable[..., Any]:
    """Add a function of the machine and the operands as what these opcodes do with as many."""

    def register(run):
        for opcode in opcodes:
            TABLE.update(dict.fromkeys([(opcode, n) for n in counts], Definition(run)))
        return run

    return register


def find(instruction: Instruction) -> Callable[..., Any]:
    """What an instruction does.

    Raises:
      Unknown: the opcode is not in the table, or has operands of other numbers or widths.
    """
    count = len(instruction.operands)
    definition = TABLE.get((instruction.opcode, count))
    if definition is None:
        raise Unknown(f"{instruction.opcode} with {count} operands: {instruction.text}")
    for operand, kind in zip(instruction.operands, definition.kinds, strict=False):
        if isinstance(operand, Register) and bits_of(operand.kind) != bits_of(kind):
            raise Unknown(f"{operand.name} is .{operand.kind}: {instruction.text}")
    return definition.run
