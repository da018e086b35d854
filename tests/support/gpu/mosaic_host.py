"""How Mosaic GPU launches a kernel: read from the host code that it compiles beside it.

The host function fills in tensor maps and describes the launch. It is straight code on constants,
in LLVM's text before optimization; the few instructions that it has are run here. An address is an
integer; each buffer of the call, and each `alloca`, starts a range of its own.
"""

import dataclasses
import itertools
import re
from typing import Any

from tests.support.ptx.faults import Unknown
from tests.support.ptx.machine import Launch
from tests.support.ptx.tensor_maps import MAP_BYTES, TensorMap

_RANGE = 1 << 40
_SIZES = {"ptr": 8, "i64": 8, "i32": 4, "i8": 1}
_ITEMSIZES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 9: 4, 10: 8}  # mosaic's numbers of types
_VALUE = r"(?:%\d+|-?\d+|undef|poison)"


def read(text: str) -> Launch:
    """The launch that the host function of a module describes."""
    [(name, body)] = re.findall(
        r"^define (?:void|i32) @(?!_mlir)(\w+)\(ptr %0, ptr %1(?:, ptr %2)?\) \{\n(.*?)^\}",
        text,
        re.S | re.M,
    )
    host = _Host()
    for line in body.splitlines():
        host.run(line.strip())
    if host.launch is None:
        raise Unknown(f"{name} describes no launch")
    return host.launch


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """So many bytes from an address."""

    start: int
    size: int


class _Host:
    def __init__(self):
        # The last argument, %1 or with jax 0.11 %2, has the buffers' addresses.
        self.values: dict[str, Any] = {"%0": 0, "%1": _RANGE, "%2": _RANGE}
        self.memory: dict[int, Any] = {_RANGE + 8 * i: (2 + i) * _RANGE for i in range(64)}
        self.allocated = 100
        self.maps: dict[int, TensorMap] = {}
        self.launch: Launch | None = None

    def run(self, line: str) -> None:
        """Run one instruction."""
        target, _, text = line.rpartition(" = ")
        for pattern, method in _INSTRUCTIONS:
            if found := re.fullmatch(pattern, text):
                value = getattr(self, method)(*found.groups())
                if target:
                    self.values[target] = value
                return
        raise Unknown(f"in the host code: {line}")

    def _get(self, text: str) -> Any:
        return self.values[text] if text[0] == "%" else {} if text[0] in "up" else int(text)

    def insert(self, aggregate, value, path):
        return {**self._get(aggregate), path: self._get(value)}

    def extract(self, aggregate, path):
        return self._get(aggregate)[path]

    def element(self, size, base, index):
        return self._get(base) + _SIZES[size] * self._get(index)

    def first(self, base):
        return self._get(base)

    def field(self, base, number):
        return self._get(base) + 8 * int(number)  # only the last one is wider

    def allocate(self):
        self.allocated += 1
        return self.allocated * _RANGE

    def load_bytes(self, size, address):
        return _Bytes(self._get(address), int(size))

    def load(self, address):
        return self.memory.get(self._get(address))

    def store(self, value, address):
        self.memory[self._get(address)] = self._get(value)

    def multiply(self, a, b):
        return self._get(a) * self._get(b)

    def add(self, a, b):
        return self._get(a) + self._get(b)

    def end(self):
        return None

    def _array(self, address, count):
        return tuple(self.memory[address + 8 * i] for i in range(count))

    def call(self, function, arguments):
        values = [self._get(a) for a in re.findall(rf"\w+ ({_VALUE})", arguments)]
        getattr(self, function)(*values)

    def mosaic_gpu_init_tma_desc(self, target, base, kind, rank, sizes, strides, swizzle, box):
        array = self._array_number(base)
        sizes, strides, box = (self._array(at, rank) for at in (sizes, strides, box))
        self.maps[target] = TensorMap(array, _ITEMSIZES[kind], sizes, strides, box, swizzle)

    def mosaic_gpu_build_kernel_spec(self, _, *values):
        *launch, shared_bytes, _, count, parameters, sizes = values
        found = {}
        for number, at in enumerate(self._array(parameters, count)):
            size = self.memory[sizes + 4 * number]
            found[number] = _Bytes(at, size) if size else self.memory[at]
        self._describe(launch, shared_bytes, found)

    def mosaic_gpu_launch_kernel(self, _, *values):
        """As jax 0.11 has it: a parameter that is not an array is a copy of its bytes."""
        *launch, shared_bytes, _, _, parameters = values
        places = (parameters + 8 * number for number in itertools.count())
        places = itertools.takewhile(self.memory.__contains__, places)
        found = {number: self.memory[self.memory[at]] for number, at in enumerate(places)}
        self._describe(launch, shared_bytes, found)

    def _describe(self, launch, shared_bytes, parameters):
        grid, cluster, block = launch[:3], launch[3:6], launch[6:9]
        if any(cluster) or tuple(block[1:]) != (1, 1):
            raise Unknown(f"a cluster {cluster}, or a block {block}")
        arrays, maps = {}, {}
        for number, value in parameters.items():
            if isinstance(value, _Bytes):
                places = range(value.start, value.start + value.size, MAP_BYTES)
                maps[number] = tuple(self.maps[place] for place in places)
            else:
                arrays[number] = self._array_number(value)
        self.launch = Launch(
            tuple(grid), block[0], shared_bytes, alignment=128, tensor_maps=maps, arrays=arrays
        )

    @staticmethod
    def _array_number(address):
        number, offset = divmod(address, _RANGE)
        if offset:
            raise Unknown("a parameter or a tensor map of a part of an array")
        return number - 2


_TYPE = r"(?:\{[^}]*\}|\[[^\]]*\]|\w+)"
_INSTRUCTIONS = [
    (rf"insertvalue .*\}} ({_VALUE}), \w+ ({_VALUE}), ([\d, ]+)", "insert"),
    (rf"extractvalue .*\}} ({_VALUE}), ([\d, ]+)", "extract"),
    (
        rf"getelementptr (?:inbounds )?(?:nuw )?(ptr|i64|i32|i8), ptr ({_VALUE}), i\d+ ({_VALUE})",
        "element",
    ),
    (rf"getelementptr \{{.*\}}, ptr ({_VALUE}), i32 0, i32 (\d)", "field"),
    (r"alloca .*", "allocate"),
    (rf"load \[(\d+) x i8\], ptr ({_VALUE}), align \d+", "load_bytes"),
    (rf"load {_TYPE}, ptr ({_VALUE}), align \d+", "load"),
    (rf"store {_TYPE} ({_VALUE}), ptr ({_VALUE}), align \d+", "store"),
    (rf"mul i64 ({_VALUE}), ({_VALUE})", "multiply"),
    (rf"add i64 ({_VALUE}), ({_VALUE})", "add"),
    (rf"(?:ptrtoint|inttoptr) \w+ ({_VALUE}) to \w+", "first"),
    (r"call (?:void|i32) @(mosaic_gpu_\w+)\((.*)\)", "call"),
    (r"ret .*", "end"),
]
