"""Which of the threads that wait at different instructions run first."""

import numpy as np

from tests.support.ptx.parser import Kernel


def schedule(kernel: Kernel) -> np.ndarray:
    """The rank of each instruction, and of the end of the code: the least runs first.

    An instruction comes after all that lead to it, but for those that go back in a loop. So threads
    that part at a branch meet where its ways do, wherever the compiler has put their code. Of two
    ways the later in the text, as the exit of a loop most often is, comes last.
    """
    end = len(kernel.code)
    ranks = np.full(end + 1, end, np.int64)
    seen, stack, rank = {0}, [(0, _after(kernel, 0))], end
    while stack:
        at, left = stack[-1]
        if not left:
            rank -= 1
            ranks[at] = rank
            stack.pop()
            continue
        following = left.pop()
        if following not in seen and following < end:
            seen.add(following)
            stack.append((following, _after(kernel, following)))
    return ranks


def _after(kernel: Kernel, at: int) -> list[int]:
    """The instructions that may follow one, the last of the text at the end."""
    instruction = kernel.code[at]
    word = instruction.opcode.partition(".")[0]
    found = set()
    if word not in ("bra", "ret", "exit") or instruction.guard:
        found.add(at + 1)
    if word == "bra":
        found.add(kernel.labels.get(instruction.operands[0].name, at + 1))
    return sorted(found)
