"""Products of four warps on Hopper, `wgmma`, which read shared memory on their own."""

import numpy as np

from tests.support.ptx.asynchronous import Product
from tests.support.ptx.faults import Fault, Unknown
from tests.support.ptx.instructions.loads import registers_of
from tests.support.ptx.instructions.mma import (
    accumulator_fragments,
    accumulator_matrix,
    left_operand,
    multiply_add,
    pairs,
)
from tests.support.ptx.instructions.moves import immediate
from tests.support.ptx.instructions.table import executes
from tests.support.ptx.parser import Vector
from tests.support.ptx.scalar_types import TYPES
from tests.support.ptx.shared_memory import WARP_GROUP

ROWS, DEPTH = 64, 16  # of the left operand
_WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a swizzled row, by the descriptor's top bits


def _everyone(machine):
    if machine.mask is not None or machine.block_size % WARP_GROUP:
        raise Unknown("wgmma by a part of the threads")


def _descriptor(machine, operand):
    """Start, leading offset and stride in bytes, [groups] each, and the swizzle's width."""
    values = machine.each(operand, "u64").reshape(-1, WARP_GROUP)
    if (values != values[:, :1]).any():
        raise Fault("a descriptor differs within a warp group")
    values = values[:, 0]
    modes = values >> np.uint64(62)
    if (modes != modes[0]).any() or (values >> np.uint64(49) & np.uint64(7)).any():
        raise Unknown("a descriptor with a base offset, or with several swizzles")
    fields = ((values >> np.uint64(at) & np.uint64(0x3FFF)).astype(np.int64) for at in (0, 16, 32))
    return *(16 * field for field in fields), _WIDTH[int(modes[0])]


def _places(machine, operand, rows, k_contiguous):
    """Addresses of the elements of a [rows, 16] operand of 16 bits: [groups, rows, 16].

    Atoms are 8 rows high. A row of an atom is as wide as the swizzle, which moves its 16-byte
    pieces by the row's number: bits 4 to 6 of an address are xor-ed with bits 7 to 9.
    """
    start, lead, stride, width = _descriptor(machine, operand)
    start, lead, stride = (v[:, None, None] for v in (start, lead, stride))
    r, k = np.arange(rows)[:, None], np.arange(DEPTH)
    if k_contiguous:
        along = k // 8 * lead + k % 8 * 2 if width == 16 else k * 2
        at = start + r // 8 * stride + r % 8 * width + along
    else:
        across = width // 2  # elements of a row of an atom
        far, near = (stride, lead) if width == 16 else (lead, stride)
        at = start + r // across * far + k // 8 * near + k % 8 * width + r % across * 2
    return at ^ ((at >> 7 & (width // 16 - 1)) << 4)


def _shared_operand(machine, operand, rows, k_contiguous, kind):
    """float32 [groups, rows, 16], and the 16-byte pieces that are read, with a thread of each.

    A piece that several warp groups read is there for each of them.
    """
    places = _places(machine, operand, rows, k_contiguous)
    owner = WARP_GROUP * np.arange(len(places))
    threads = np.broadcast_to(owner[:, None, None], places.shape).reshape(-1)
    offsets = machine.shared.offsets(places.reshape(-1).astype(np.uint64), 2, threads)
    elements = machine.shared.bytes.view(TYPES[kind])[offsets // 2].reshape(places.shape)
    found = np.stack([threads, offsets // 16 * 16], -1)
    readers, pieces = np.unique(found, axis=0).T
    return elements.astype(np.float32), pieces, readers


def _define(n, kind):
    @executes(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}", counts=(7, 8))
    def product(machine, target, a, b, accumulate, scale_a, scale_b, *major):
        """[64, 16] times [16, n], added to [64, n] where `accumulate`; 1 in `major`: k is not
        contiguous. There is one for b, and one for a before it if a is in shared memory."""
        _everyone(machine)
        if [immediate(s, "a scale") for s in (scale_a, scale_b)] != [1, 1]:
            raise Unknown("a negated operand")
        if len(major) != 1 + (not isinstance(a, Vector)):
            raise Unknown("the number of operands")
        major = [immediate(m, "an order") for m in major]
        results, fragments, reads = registers_of(target, n // 2), (), []
        if isinstance(a, Vector):
            fragments = registers_of(a, 4)
            left = left_operand(pairs(machine, fragments, kind), ROWS)
        else:
            left, *read = _shared_operand(machine, a, ROWS, not major[0], kind)
            reads.append(read)
        right, *read = _shared_operand(machine, b, n, not major[-1], kind)
        reads.append(read)
        changed = {register.name for register in (*results, *fragments)} & machine.registers.changed
        if changed:
            raise Fault(f"no wgmma.fence after {min(changed)} was written")
        total = np.float32(0)
        keep = machine.each(accumulate, "pred").reshape(-1, WARP_GROUP)[:, 0]
        if keep.any():
            old = [machine.registers.get_in_flight(r, None) for r in results]
            old = accumulator_matrix(np.stack(old, -1).view(np.float32), ROWS)
            total = np.where(keep[:, None, None], old, total)
        result = accumulator_fragments(multiply_add(left, right.swapaxes(1, 2), total))
        for i, register in enumerate(results):
            machine.registers.put_in_flight(register, result[:, i], None)
        pieces, threads = (np.concatenate(part) for part in zip(*reads, strict=True))
        machine.shared.start_tensor_read(pieces, 16, threads)
        machine.products.start(Product(results, fragments, pieces, 16, threads))
        machine.registers.in_flight = machine.products.in_flight()


for kind in ("f16", "bf16"):
    for n in range(8, 257, 8):
        _define(n, kind)


@executes("wgmma.fence.sync.aligned", counts=(0,))
def fence(machine):
    """Order the registers' writes before the products that follow."""
    _everyone(machine)
    machine.registers.changed.clear()


@executes("wgmma.commit_group.sync.aligned", counts=(0,))
def commit(machine):
    """Close a group."""
    _everyone(machine)
    machine.products.commit()


@executes("wgmma.wait_group.sync.aligned", counts=(1,))
def wait(machine, keep):
    """Wait until at most `keep` groups are under way."""
    _everyone(machine)
    for product in machine.products.wait(immediate(keep, "a number of groups")):
        machine.shared.end_tensor_read(product.offsets, product.size, product.threads)
    machine.registers.in_flight = machine.products.in_flight()


@executes("fence.proxy.async", "fence.proxy.async.shared::cta", counts=(0,))
def fence_proxy(machine):
    """Show the tensor core what was written to shared memory."""
    machine.shared.fence_proxy(machine.lanes)
