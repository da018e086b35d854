"""What the threads of a warp do together: exchanges, reductions and votes."""

import numpy as np

from tests.support.ptx.faults import Unknown
from tests.support.ptx.instructions.table import executes
from tests.support.ptx.parser import Vector


def _all_lanes(machine, members):
    """The member mask must name the whole warp, and the whole warp must be there."""
    if (machine.each(members, "u32")[machine.lanes] != 0xFFFFFFFF).any():
        raise Unknown("a part of a warp")
    machine.whole(32, "an instruction of a warp")


@executes("bar.warp.sync", counts=(1,))
def barrier(machine, members):
    """Wait for all threads of the warp, and see what they did to memory."""
    _all_lanes(machine, members)
    machine.shared.warp_barrier(machine.lanes)


def _shuffle(machine, target, value, by, bounds, members, mode):
    _all_lanes(machine, members)
    value = machine.each(value, "b32")
    by = machine.each(by, "u32").astype(np.int64) & 31
    bounds = machine.each(bounds, "u32").astype(np.int64)
    lane = machine.everyone % 32
    segment, limit = bounds >> 8 & 31, bounds & 31
    low = lane & segment
    last = low | (limit & ~segment)
    source = {"bfly": lane ^ by, "idx": low | (by & ~segment), "up": lane - by, "down": lane + by}
    within = source[mode] >= last if mode == "up" else source[mode] <= last
    chosen = np.where(within, source[mode], lane)
    first, *rest = target.parts if isinstance(target, Vector) else (target,)
    machine.put(first, value[machine.everyone - lane + chosen])
    for predicate in rest:
        machine.put(predicate, within)


def _define_shuffle(mode):
    @executes(f"shfl.sync.{mode}.b32", counts=(5,))
    def shuffle(machine, *operands):
        _shuffle(machine, *operands, mode)


for mode in ("bfly", "idx", "up", "down"):
    _define_shuffle(mode)


@executes("movmatrix.sync.aligned.m8n8.trans.b16", counts=(2,))
def transpose(machine, target, value):
    """Transpose an [8, 8] matrix of 16 bits, of which lane i has row i // 4, columns 2 (i % 4)."""
    machine.whole(32, "an instruction of a warp")
    words = np.ascontiguousarray(machine.each(value, "b32")).view(np.uint16)
    moved = words.reshape(-1, 8, 8).swapaxes(1, 2)
    machine.put(target, np.ascontiguousarray(moved).reshape(-1).view(np.uint32))


@executes("elect.sync", counts=(2,))
def elect(machine, target, members):
    """Choose one thread of each warp, and tell all which: here the first."""
    _all_lanes(machine, members)
    leader, chosen = target.parts
    machine.put(leader, np.zeros(machine.count, np.uint32))
    machine.put(chosen, machine.everyone % 32 == 0)


_REDUCTIONS = {"max": np.max, "min": np.min, "add": np.sum}
_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _define_reduction(name, kind, reduce):
    @executes(f"redux.sync.{name}.{kind}", counts=(3,))
    def reduction(machine, target, value, members):
        _all_lanes(machine, members)
        value = machine.each(value, kind).reshape(-1, 32)
        machine.put(target, np.repeat(reduce(value, axis=1).astype(value.dtype), 32))


for name, reduce in _REDUCTIONS.items():
    _define_reduction(name, "s32", reduce)
    _define_reduction(name, "u32", reduce)
for name, combine in _BITS.items():
    _define_reduction(name, "b32", combine.reduce)


@executes("vote.sync.ballot.b32", counts=(3,))
def ballot(machine, target, value, members):
    """Bit i is lane i's predicate."""
    _all_lanes(machine, members)
    value = machine.each(value, "pred").reshape(-1, 32)
    words = np.packbits(value, axis=1, bitorder="little").view(np.uint32)
    machine.put(target, np.repeat(words[:, 0], 32))


def _define_vote(name, decide):
    @executes(f"vote.sync.{name}.pred", counts=(3,))
    def vote(machine, target, value, members):
        _all_lanes(machine, members)
        value = machine.each(value, "pred").reshape(-1, 32)
        machine.put(target, np.repeat(decide(value, axis=1), 32))


_define_vote("any", np.any)
_define_vote("all", np.all)
