"""The two ways in which a program ends early."""


class Fault(Exception):
    """The program did what it must not do: the message says what, and which instruction."""


class Unknown(Exception):
    """The machine does not know an instruction, a modifier or a form of an operand."""
