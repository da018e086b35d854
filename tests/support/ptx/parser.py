"""PTX text -> a kernel: its parameters, its shared memory, and its instructions in a list."""

import dataclasses
import re

import numpy as np

from tests.support.ptx.faults import Unknown
from tests.support.ptx.scalar_types import TYPES


@dataclasses.dataclass(frozen=True)
class Register:
    """A register; `negated` where a predicate is written with `!`."""

    name: str
    kind: str
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a float of `width` bits (0 for an integer)."""

    value: int
    width: int = 0


@dataclasses.dataclass(frozen=True)
class Special:
    """A special register, such as %tid.x."""

    name: str


@dataclasses.dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a parameter."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: "Register | Symbol | Immediate"
    offset: int


@dataclasses.dataclass(frozen=True)
class Vector:
    """`{a, b}`, or `a|b` where an instruction has two results."""

    parts: tuple["Operand", ...]


Operand = Register | Immediate | Special | Symbol | Address | Vector


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. A branch has the label's name as its only operand."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str


@dataclasses.dataclass
class Kernel:
    """An entry of a module.

    Attributes:
      name, target: as the text has them.
      parameters: name -> the alignment of what it points to.
      threads: of a block, or None where the text does not say.
      shared: symbol -> offset in shared memory; what is not sized comes last.
      static_shared: bytes before that one.
      constants: symbol -> the bytes of an initialized global variable.
      code: the instructions.
      labels: name -> index in `code`.
    """

    name: str
    target: str
    parameters: dict[str, int]
    threads: int | None
    shared: dict[str, int] = dataclasses.field(default_factory=dict)
    static_shared: int = 0
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    code: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)


_ENTRY = re.compile(
    r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)((?:\s*\.\w+[^\n{]*)*)\s*\{(.*)\}", re.S
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.(?:u64|u32)\s+(?:\.ptr\s+(?:\.global\s+)?)?)?(?:\.align\s+(\d+)\s+)?(?:\.b8\s+)?([\w$]+)"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)(?:\[(\d*)\])?\s*;")
_CONSTANT = re.compile(
    r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\](?:\s*=\s*\{([^}]*)\})?"
)
# What starts a body's next piece: a label, a brace around a scope, or a statement up to its ";".
_PIECE = re.compile(r"\s*(?:([$\w]+):(?!:)|(\{)|(\})|((?:[^;{}]++|\{[^{};]*\})*+);)")
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)


def parse(text: str) -> Kernel:
    """The one kernel of a module."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
    # What is for debuggers alone: the lines of the source, and all behind the entry.
    text, *_ = re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.M)
    text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.M)
    if len(re.findall(r"\.entry\b", text)) != 1 or re.search(r"\.func\b", text):
        raise Unknown("a module that is not one entry alone")
    [(name, parameters, directives, body)] = _ENTRY.findall(text)
    threads = re.search(r"\.reqntid\s+(\d+)(?:,\s*1)*\s*$", directives.strip(), re.M)
    kernel = Kernel(
        name,
        re.search(r"\.target\s+(\w+)", text)[1],
        {name: int(align or 1) for align, name in _PARAMETER.findall(parameters)},
        int(threads[1]) if threads else None,
    )
    if parameters.count(".param") != len(kernel.parameters):
        raise Unknown(f"parameters that are neither addresses nor of 32 bits: {parameters}")
    for align, symbol, size in sorted(_SHARED.findall(text), key=lambda found: not found[2]):
        align = max(int(align), 128)
        kernel.shared[symbol] = kernel.static_shared = -(-kernel.static_shared // align) * align
        kernel.static_shared += int(size or 0)
    for symbol, size, values in _CONSTANT.findall(text):
        data = np.zeros(int(size), np.uint8)
        data[: values.count(",") + 1 if values else 0] = [int(v, 0) for v in values.split(",") if v]
        kernel.constants[symbol] = data
    _Body(kernel).read(body)
    return kernel


class _Body:
    """Reads the statements of a kernel's body; braces open a scope for names and labels."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        # Of each scope its labels by their names in the kernel, and its first instruction.
        self.labels: list[tuple[dict[str, str], int]] = [({}, 0)]
        self.suffixes = [""]  # what tells the names of a scope from those of others
        self.opened = 0

    def read(self, body: str) -> None:
        at, body = 0, body.rstrip()
        while at < len(body):
            piece = _PIECE.match(body, at)
            if not piece:
                raise Unknown(f"a statement: {body[at : at + 60]!r}")
            at = piece.end()
            label, opens, closes, statement = piece.groups()
            if label:
                labels, _ = self.labels[-1]
                if label in labels:
                    raise Unknown(f"the label {label} again")
                labels[label] = label + self.suffixes[-1]
                self.kernel.labels[labels[label]] = len(self.kernel.code)
            elif opens:
                self.opened += 1
                self.scopes.append({})
                self.labels.append(({}, len(self.kernel.code)))
                self.suffixes.append(f"#{self.opened}")
            elif closes:
                self.scopes.pop()
                self.suffixes.pop()
                self._resolve(*self.labels.pop())
            elif statement.strip():
                self._statement(" ".join(statement.split()))

    def _resolve(self, labels: dict[str, str], start: int) -> None:
        """A scope has ended: its branches that go to its labels."""
        for at, instruction in enumerate(self.kernel.code[start:], start):
            [target, *_] = instruction.operands or [None]
            is_branch = instruction.opcode.startswith("bra") and isinstance(target, Symbol)
            if is_branch and target.name in labels:
                operands = (Symbol(labels[target.name]),)
                self.kernel.code[at] = dataclasses.replace(instruction, operands=operands)

    def _statement(self, text: str) -> None:
        if text.startswith(".shared"):
            return  # read with the module
        if text.startswith(".reg"):
            self._declare(text)
        elif not text.startswith(".pragma "):
            self._instruction(text)

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        if kind[1:] not in TYPES:
            raise Unknown(text)
        for name in names.replace(" ", "").split(","):
            many = re.fullmatch(r"(%\w+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][one] = Register(one + self.suffixes[-1], kind[1:])

    def _instruction(self, text: str) -> None:
        matched = _STATEMENT.fullmatch(text)
        if not matched:
            raise Unknown(text)
        negated, guard, opcode, rest = matched.groups()
        try:
            operands = tuple(self._operand(part) for part in _split(rest))
            condition = guard and dataclasses.replace(self._register(guard), negated=bool(negated))
        except (KeyError, ValueError) as error:
            raise Unknown(f"{text}: {error}") from None
        self.kernel.code.append(Instruction(opcode, operands, condition or None, text))

    def _register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise KeyError(f"{name} is not declared")

    def _operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            if "," in text:  # an address with coordinates
                return Vector(
                    tuple(
                        self._operand(part if part[0] == "{" else f"[{part}]")
                        for part in _split(text[1:-1])
                    )
                )
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return Address(self._operand(base), int(offset or "0", 0))
        if "|" in text:
            return Vector(tuple(self._operand(part.strip()) for part in text.split("|")))
        if text[0] == "!":
            return dataclasses.replace(self._register(text[1:]), negated=True)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return Immediate(int(text[2:], 16), 4 * len(text[2:]))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if any(text in scope for scope in self.scopes):
            return self._register(text)
        if re.fullmatch(r"%[a-z]+(\.[xyz])?", text):
            return Special(text)
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        raise ValueError(f"{text!r} is no operand")


def _split(text: str) -> list[str]:
    """The parts between commas, of which braces and brackets hold some together."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text)]
