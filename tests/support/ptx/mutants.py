"""Altered programs: one instruction is deleted or changed, and something should notice."""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator

from tests.support.ptx.faults import Unknown
from tests.support.ptx.instructions import find
from tests.support.ptx.parser import Address, Immediate, Instruction, Kernel, Register, Vector

# Pieces of an opcode, and what they become.
_EXCHANGED = {
    a: b
    for one, other in [("add", "sub"), ("and", "or"), ("min", "max"), ("shl", "shr"), ("eq", "ne")]
    for a, b in ((one, other), (other, one))
}
_EXCHANGED |= {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "gtu": "geu", "leu": "ltu"}
_EXCHANGED |= {"mul": "add", "xor": "and", "trans": ""}
_COMMUTES = re.compile(r"(add|and|or|xor|mul|min|max|setp\.(eq|ne)|fma|mad)\.")
ORDER = re.compile(r"bar\.|cp\.async\.(commit|wait)|wgmma\.(fence|commit|wait)|fence\.|mbarrier\.")
_EFFECTS = re.compile(r"st\.|stmatrix|cp\.async\.(c[ag]|bulk)|" + ORDER.pattern)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """What was done to which instruction, and the kernel that comes of it."""

    what: str
    at: int
    instruction: Instruction
    kernel: Kernel

    def __str__(self):
        return f"{self.what}: {self.at}: {self.instruction.text}"


def mutants(kernel: Kernel, seed: int = 0) -> Iterator[Mutant]:
    """Altered kernels, shuffled; every other one, while there are any, in what orders accesses."""
    every = [
        (at, what, changed)
        for at, instruction in enumerate(kernel.code)
        for what, changed in _alterations(instruction)
    ]
    random.Random(seed).shuffle(every)
    ordering = [one for one in every if ORDER.match(kernel.code[one[0]].opcode)]
    others = [one for one in every if one not in ordering]
    alternating = itertools.chain.from_iterable(itertools.zip_longest(ordering, others))
    for at, what, changed in filter(None, alternating):
        code = [*kernel.code]
        code[at] = changed
        yield Mutant(what, at, kernel.code[at], dataclasses.replace(kernel, code=code))


def _alterations(instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    """Each change of one instruction that leaves one that the machine knows."""
    if instruction.opcode == "ret" or instruction.opcode.startswith("ld.param"):
        return
    for what, changed in _changes(instruction):
        try:
            find(changed)
        except Unknown:
            continue
        yield what, changed


def _changes(instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    change, opcode, operands = dataclasses.replace, instruction.opcode, instruction.operands
    if opcode.startswith("mbarrier.try_wait"):
        done = operands[0], Immediate(1)
        yield "waits for none", change(instruction, opcode="mov.pred", operands=done)
    elif _EFFECTS.match(opcode):
        yield "deleted", change(instruction, opcode="griddepcontrol.wait", operands=(), guard=None)
    if instruction.guard:
        opposite = change(instruction.guard, negated=not instruction.guard.negated)
        yield "guard negated", change(instruction, guard=opposite)
        yield "guard dropped", change(instruction, guard=None)
    pieces = opcode.split(".")
    for i, piece in enumerate(pieces):
        if piece in _EXCHANGED:
            other = ".".join(filter(None, [*pieces[:i], _EXCHANGED[piece], *pieces[i + 1 :]]))
            yield f"to {other}", change(instruction, opcode=other)
    for i, operand in enumerate(operands):
        if pieces[0] == "bar":
            continue  # all threads would meet at another of the 16 barriers
        if "wait_group" in opcode and operand.value:
            yield "constant + 1", change(instruction, operands=(Immediate(operand.value + 1),))
            continue  # to wait for more than is needed is no fault
        for what, altered in _altered(operand, pieces[0] in ("setp", "selp")):
            yield what, change(instruction, operands=(*operands[:i], altered, *operands[i + 1 :]))
    first = 3 if opcode.startswith("mad") else 1
    sources = [i for i, o in enumerate(operands) if i >= first and isinstance(o, Register)]
    for i, j in itertools.pairwise(sources):
        if operands[i] != operands[j] and not _COMMUTES.match(opcode):
            swapped = [*operands]
            swapped[i], swapped[j] = swapped[j], swapped[i]
            yield "sources swapped", change(instruction, operands=tuple(swapped))


def _altered(operand, exact):
    """Changes of an operand; of a float's last bit only where it is not rounded away later."""
    if isinstance(operand, Immediate) and operand.width:
        if exact:
            yield "next float", dataclasses.replace(operand, value=operand.value + 1)
        if operand.value % 2**31:  # not zero
            yield "another exponent", dataclasses.replace(operand, value=operand.value ^ 1 << 23)
    elif isinstance(operand, Immediate):
        if abs(operand.value) < 4096:  # the last bit of a longer one may be masked
            yield "constant + 1", dataclasses.replace(operand, value=operand.value + 1)
        if operand.value not in (0, -1):
            yield "constant / 2", dataclasses.replace(operand, value=operand.value // 2)
    elif isinstance(operand, Address):
        yield "address + 16", dataclasses.replace(operand, offset=operand.offset + 16)
    elif isinstance(operand, Vector) and isinstance(operand.parts[0], Address):
        for i, part in enumerate(operand.parts):  # with coordinates
            for what, altered in _altered(part, exact):
                yield what, Vector((*operand.parts[:i], altered, *operand.parts[i + 1 :]))
    elif isinstance(operand, Vector) and len(set(operand.parts)) > 1:
        yield "vector rotated", Vector((*operand.parts[1:], operand.parts[0]))
