"""Runs the instructions of a launch, on all threads at once."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from tests.support.ptx.asynchronous import Copies, Products
from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.global_memory import GlobalMemory, OverlappingResults
from tests.support.ptx.instructions import find
from tests.support.ptx.parser import Address, Immediate, Kernel, Operand, Register, Special, Symbol
from tests.support.ptx.registers import Registers
from tests.support.ptx.scalar_types import TYPES, UNSIGNED, bits_of
from tests.support.ptx.schedule import schedule
from tests.support.ptx.shared_memory import BASE as SHARED_BASE
from tests.support.ptx.shared_memory import SharedMemory
from tests.support.ptx.tensor_maps import Barrier, TensorMap, TensorMaps


@dataclasses.dataclass(frozen=True)
class Launch:
    """How a kernel is started.

    Attributes:
      grid: blocks in x, y, z.
      threads: of a block.
      shared_bytes: of a block's dynamic shared memory.
      scalars: the values of those parameters that are no arrays, by their numbers.
      alignment: bytes that arrays are aligned to, where the text promises fewer.
      tensor_maps: those parameters that hold maps, by their numbers.
      arrays: the parameters' arrays where there are others too, by their numbers.
    """

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    scalars: Mapping[int, int] = dataclasses.field(default_factory=dict)
    alignment: int = 1
    tensor_maps: Mapping[int, tuple[TensorMap, ...]] = dataclasses.field(default_factory=dict)
    arrays: Mapping[int, int] | None = None


_SINK = Symbol("_")


class Machine:
    """A launch of a kernel on arrays.

    Attributes:
      shared_memory, global_memory: the classes of its memories.

    Args:
      kernel: the kernel.
      launch: its launch.
      operands, results: arrays, in the order of the kernel's parameters.

    Raises:
      Unknown: there is an instruction that the machine does not know, executed or not.
    """

    shared_memory, global_memory = SharedMemory, GlobalMemory

    def __init__(self, kernel: Kernel, launch: Launch, operands, results):
        if kernel.threads not in (None, launch.threads) or launch.threads % 32:
            raise Unknown(f"{launch.threads} threads for a kernel of {kernel.threads}")
        names = list(kernel.parameters)
        scalars = {names[number]: value for number, value in launch.scalars.items()}
        maps = {names[number]: value for number, value in launch.tensor_maps.items()}
        self.tensor_maps = TensorMaps(maps)
        arrays = [name for name in names if name not in scalars and name not in maps]
        if launch.arrays is not None:
            named = {number: names[parameter] for parameter, number in launch.arrays.items()}
            if sorted(named.values()) != sorted(arrays):
                raise Unknown(f"the parameters {arrays} as {named}")
            arrays = [named.get(i) for i in range(len(operands) + len(results))]
        if len(arrays) != len(operands) + len(results):
            raise Unknown(f"{len(names)} parameters, {len(scalars)} of them scalars")
        self.kernel = kernel
        self.steps = [find(instruction) for instruction in kernel.code]
        self.ranks = schedule(kernel).tolist()
        blocks = int(np.prod(launch.grid))
        self.block_size = launch.threads
        self.count = blocks * launch.threads  # threads of the launch
        self.everyone = np.arange(self.count)
        self.registers = Registers(self.count)
        constants = list(kernel.constants.values())
        self.constants = len(constants)
        self.barriers: dict[int, Barrier] = {}
        alignments = [max(kernel.parameters.get(name, 1), launch.alignment) for name in arrays]
        self.memory = self.global_memory(
            [*constants, *operands], results, [128] * len(constants) + alignments
        )
        self.addresses = dict(
            zip(
                [*kernel.constants, *arrays],
                map(self.memory.address, range(len(self.memory.offsets))),
                strict=True,
            )
        )
        self.addresses |= scalars | self.tensor_maps.addresses
        self.addresses |= {n: SHARED_BASE + at for n, at in kernel.shared.items()}
        self.shared = self.shared_memory(
            blocks, launch.threads, kernel.static_shared + launch.shared_bytes, _grain(kernel)
        )
        self.copies, self.products = Copies(self.count), Products()
        self.special = _special_registers(launch, self.count)
        self.mask: np.ndarray | None = None  # which threads run an instruction; None: all
        self.executed = 0

    # What instructions use.

    @property
    def lanes(self):
        """The numbers of the threads that run this instruction."""
        return self.everyone if self.mask is None else np.flatnonzero(self.mask)

    def get(self, operand: Operand, kind: str):
        """An operand's values, an array with one for each thread or a scalar."""
        dtype = TYPES[kind]
        if isinstance(operand, Register):
            value = self.registers.get(operand, self.mask)
            if (operand.kind == "pred") != (kind == "pred") or value.itemsize < dtype.itemsize:
                raise Unknown(f"{operand.name}, .{operand.kind}, as .{kind}")
            if kind == "pred":
                return ~value if operand.negated else value
            if value.itemsize > dtype.itemsize:
                value = value.astype(UNSIGNED[bits_of(kind)])
            return value.view(dtype)
        if isinstance(operand, Immediate):
            return constant(operand, kind)
        if isinstance(operand, Special) and operand.name in self.special:
            return self.special[operand.name].view(dtype)
        if isinstance(operand, Symbol) and operand.name in self.addresses:
            return dtype.type(self.addresses[operand.name])
        raise Unknown(f"the operand {operand}")

    def each(self, operand: Operand, kind: str):
        """The same, as an array of all threads."""
        return np.broadcast_to(self.get(operand, kind), (self.count,))

    def put(self, register: Operand, value) -> None:
        """Write a register in the threads that run this instruction; `_` takes what none wants."""
        if register != _SINK:
            self.registers.put(register, value, self.mask)

    def address(self, operand: Address, lanes):
        """The addresses that threads name, uint64."""
        wide = not isinstance(operand.base, Register) or operand.base.kind.endswith("64")
        base = self.each(operand.base, "u64" if wide else "u32")[lanes].astype(np.uint64)
        return base + np.uint64(operand.offset % 2**64)

    def whole(self, size: int, what: str) -> None:
        """Check that all threads of a warp (32), a warp group or a block run this, or none."""
        if self.mask is None:
            return
        groups = self.mask.reshape(-1, size)
        if (groups.any(1) != groups.all(1)).any():
            raise Fault(f"{what} without some of its {size} threads")

    def counts(self) -> dict[str, int]:
        """What a machine that counts has counted."""
        return {}

    # Running.

    def run(self, limit: int = 10_000_000) -> "Machine":
        """Run the launch to its end, which must come within `limit` instructions."""
        waiting: dict[int, np.ndarray] = {0: np.ones(self.count, bool)}  # by the next instruction
        with np.errstate(all="ignore"):
            while waiting:
                at = min(waiting, key=self.ranks.__getitem__)
                self._run_group(at, waiting.pop(at), waiting, limit)
        self.copies.end()
        self.products.end()
        return self

    def _run_group(self, at, active, waiting, limit) -> None:
        """Run some threads until they branch or come to where others wait."""
        everyone = None if active.all() else active
        next_rank = min(map(self.ranks.__getitem__, waiting), default=self.ranks[-1])
        while self.ranks[at] < next_rank:
            self.executed += 1
            if self.executed > limit:
                raise Fault(f"no end within {limit} instructions")
            instruction = self.kernel.code[at]
            try:
                jump = self._step(at, everyone)
            except (Fault, Unknown) as error:
                raise type(error)(f"{error}: {instruction.text}") from None
            if jump is not None:
                taken = active if self.mask is None else self.mask
                _join(waiting, at + 1, active & ~taken)
                if jump.label:
                    _join(waiting, self.kernel.labels[jump.label], taken)
                return
            at += 1
        if at == len(self.steps):
            raise Fault("the code ends without ret")
        _join(waiting, at, active)

    def _step(self, at, active):
        """Run an instruction in the threads `active` (None: all) where its guard holds."""
        instruction, self.mask = self.kernel.code[at], active
        if instruction.guard:
            guard = self.get(instruction.guard, "pred")
            self.mask = guard if active is None else guard & active
            if not self.mask.any():
                return None
        return self.steps[at](self, *instruction.operands)


class TilesThatOverlap(Machine):
    """For Triton's kernels: the last tile of a result is whole, and has a part of another."""

    global_memory = OverlappingResults


def _join(waiting, at, threads) -> None:
    if threads.any():
        waiting[at] = waiting[at] | threads if at in waiting else threads


def constant(operand: Immediate, kind: str):
    """The constant as a numpy scalar of a type."""
    width = bits_of(kind)
    if operand.width not in (0, width):
        raise Unknown(f"a float of {operand.width} bits as .{kind}")
    if kind == "pred":
        return np.bool_(operand.value)
    value = np.array(operand.value % 2**width, UNSIGNED[width])
    return value.view(TYPES[kind])[()]


def _grain(kernel: Kernel) -> int:
    """Bytes of the smallest access to shared memory."""
    kinds = [i.opcode.rpartition(".")[2] for i in kernel.code if ".shared" in i.opcode]
    sizes = [bits_of(kind) // 8 for kind in kinds if kind in TYPES]
    return min([4, *sizes])


def _special_registers(launch: Launch, count: int):
    thread, block = np.arange(count) % launch.threads, np.arange(count) // launch.threads
    x, y, _ = launch.grid
    values = {
        "%tid.x": thread,
        "%laneid": thread % 32,
        "%warpid": thread // 32,
        "%ctaid.x": block % x,
        "%ctaid.y": block // x % y,
        "%ctaid.z": block // x // y,
        "%ntid.x": np.full(count, launch.threads),
        **{
            f"%nctaid.{axis}": np.full(count, n) for axis, n in zip("xyz", launch.grid, strict=True)
        },
    }
    return {name: value.astype(np.uint32) for name, value in values.items()}
