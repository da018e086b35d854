"""What runs beside the threads until they wait for it: copies (Ampere) and products (Hopper)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tests.support.ptx.faults import Fault
from tests.support.ptx.parser import Register


@dataclasses.dataclass
class _Copy:
    """16 bytes or fewer for each of some threads, and the number of the group they belong to."""

    threads: np.ndarray
    groups: np.ndarray
    offsets: np.ndarray
    size: int

    def part(self, which) -> "_Copy":
        return _Copy(self.threads[which], self.groups[which], self.offsets[which], self.size)


class Copies:
    """`cp.async`: each of `count` threads has groups of its own."""

    def __init__(self, count: int):
        self._committed = np.zeros(count, np.int64)  # groups a thread has closed
        self._open: list[_Copy] = []

    def start(self, threads, offsets, size: int) -> None:
        """Threads start copies to these places in shared memory."""
        self._open.append(_Copy(threads, self._committed[threads], offsets, size))

    def commit(self, threads) -> None:
        """Threads close a group."""
        self._committed[threads] += 1

    def wait(self, threads, keep: int) -> list[_Copy]:
        """What is complete when threads wait until at most `keep` of their groups are under way."""
        limit = np.full(len(self._committed), -1, np.int64)
        limit[threads] = self._committed[threads] - keep
        complete, left = [], []
        for copy in self._open:
            done = copy.groups < limit[copy.threads]
            complete += [copy.part(done)] if done.any() else []
            left += [copy.part(~done)] if not done.all() else []
        self._open = left
        return complete

    def end(self) -> None:
        """The launch ends."""
        if self._open:
            raise Fault("the launch ends with copies that were not waited for")


@dataclasses.dataclass
class Product:
    """A `wgmma`: the registers that it changes and reads, the places in shared memory it reads."""

    results: Sequence[Register]
    inputs: Sequence[Register]
    offsets: np.ndarray
    size: int
    threads: np.ndarray


class Products:
    """`wgmma`, which all threads of a launch run together."""

    def __init__(self):
        self._open: list[Product] = []
        self._groups: list[list[Product]] = []

    def start(self, product: Product) -> None:
        """Start a product."""
        self._open.append(product)

    def commit(self) -> None:
        """Close a group."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, keep: int) -> list[Product]:
        """What is complete when at most `keep` groups are under way."""
        done = self._groups[: max(0, len(self._groups) - keep)]
        self._groups = self._groups[len(done) :]
        return [product for group in done for product in group]

    def in_flight(self) -> tuple[set[str], set[str]]:
        """The names of the others' results, and of their inputs."""
        products = [*self._open, *(p for group in self._groups for p in group)]
        results = {register.name for product in products for register in product.results}
        return results, {register.name for product in products for register in product.inputs}

    def end(self) -> None:
        """The launch ends."""
        if self._open or any(self._groups):
            raise Fault("the launch ends with products that were not waited for")
