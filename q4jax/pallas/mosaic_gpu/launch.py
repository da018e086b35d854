"""The loop of the kernels: copies of later tiles arrive while a tile is decoded and multiplied."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_STAGES = 3
_SHARED_BYTES = 113 * 1024  # of a program, so that a multiprocessor runs two
_WARP_GROUPS = 528  # 4 a multiprocessor
_LEAST_STEPS = 4  # of a program, where a sum is split


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that programs read by tiles.

    Attributes:
      array: [rows, columns]. What a tile has outside of it is 0.
      tile: the rows and columns of a tile.
      transforms: how a tile lies in shared memory.
      place: (step, row, column) -> where a tile starts in the array; row and column are those of
        the program's tile of the result, in tiles, and steps are counted over all splits.
      first: int32 [1], what is added to the row where a tile starts; a tile may then have rows of
        the array that are not meant. None for 0.
    """

    array: Array
    tile: tuple[int, int]
    transforms: tuple[Any, ...]
    place: Callable[[Any, Any, Any], tuple[Any, Any]]
    first: Array | None = None

    @property
    def bytes(self) -> int:
        """Of a tile."""
        return self.tile[0] * self.tile[1] * self.array.dtype.itemsize


def share(tiles: int, steps: int, groups: int = 1) -> tuple[int, int]:
    """Split sums where there are few tiles of the result: (steps of a split, splits).

    Args:
      tiles: of the result, one for each program of a split.
      steps: of the whole sum.
      groups: warp groups of a program.
    """
    splits = max(1, min(_WARP_GROUPS // (tiles * groups), steps // _LEAST_STEPS))
    each = -(-steps // splits)
    return each, -(-steps // each)


def launch(
    name: str,
    operands: Sequence[Operand],
    multiply: Callable[..., None],
    *,
    tile: tuple[int, int],
    tiles: tuple[int, int],
    steps: int,
    splits: int,
    groups: int = 1,
) -> Array:
    """Sum over steps: float32 [rows, columns] of whole tiles, the splits added in one order.

    A program has one warp group, or two that run the same code on the same copies. Each has the
    rows of the tile that come after those of the other.

    Args:
      name: of the kernel; a prefix is added.
      operands: what it reads.
      multiply: `multiply(total, *tiles)` adds the product of a step to the accumulator `total`
        of a warp group. Threads are numbered through the program.
      tile: rows and columns of a tile of the result.
      tiles: how many there are each way.
      steps: of a split.
      splits: programs that share a sum.
      groups: warp groups of a program.
    """
    part = tile[0] // groups
    firsts = [operand.first for operand in operands if operand.first is not None]
    inputs = len(operands) + len(firsts)
    stages = min(_STAGES, steps, _SHARED_BYTES // sum(operand.bytes for operand in operands))

    def body(*refs: Any) -> None:
        sources, named = refs[: len(operands)], iter(refs[len(operands) : inputs])
        result, *scratch = refs[inputs:]
        buffers, (arrived, *consumed) = scratch[: len(operands)], scratch[len(operands) :]
        begins = [0 if operand.first is None else next(named)[0] for operand in operands]
        group = lax.axis_index("group") if groups > 1 else 0
        split, row, column = (lax.axis_index(axis) for axis in ("split", "row", "column"))

        def copy(step: Any, slot: Any) -> None:
            for operand, source, first, buffer in zip(
                operands, sources, begins, buffers, strict=True
            ):
                start, *starts = operand.place(split * steps + step, row, column)
                where = tuple(map(pl.ds, (first + start, *starts), operand.tile))
                plgpu.copy_gmem_to_smem(source.at[where], buffer.at[slot], arrived.at[slot])

        def accumulate(total: Any) -> Array:
            def run(step: Any, slot: Any) -> Any:
                before = jnp.where(slot == 0, stages - 1, slot - 1)

                @pl.when((step > 0) & (step + stages <= steps) & (group == 0))
                def later() -> None:
                    for barrier in consumed:
                        plgpu.barrier_wait(barrier.at[before])
                    copy(step + stages - 1, before)

                plgpu.barrier_wait(arrived.at[slot])
                multiply(total, *(buffer.at[slot] for buffer in buffers))
                plgpu.wgmma_wait(0)
                # This thread has read its codes, and the tensor core the rest for it.
                for barrier in consumed:
                    plgpu.barrier_arrive(barrier.at[slot])
                if not consumed:
                    plgpu.commit_smem()
                return jnp.where(slot == stages - 1, 0, slot + 1)

            lax.fori_loop(0, steps, run, jnp.int32(0))
            return total[...]

        @pl.when(group == 0)
        def start() -> None:
            for step in range(stages):
                copy(step, step)

        total = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((part, tile[1]), jnp.float32))
        rows = pl.ds(row * tile[0] + group * part, part)
        result[split, rows, pl.ds(column * tile[1], tile[1])] = total

    buffers = (
        plgpu.SMEM((stages, *o.tile), o.array.dtype, transforms=o.transforms) for o in operands
    )
    # One warp group waits for itself, without a barrier of its own.
    counts = (len(operands), groups) if groups > 1 else (len(operands),)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (splits, tile[0] * tiles[0], tile[1] * tiles[1]), jnp.float32
        ),
        scratch_types=(
            *buffers,
            *(plgpu.Barrier(num_arrivals=count, num_barriers=stages) for count in counts),
        ),
        grid=(splits, *tiles),
        grid_names=("split", "row", "column"),
        num_threads=groups if groups > 1 else None,
        thread_name="group" if groups > 1 else None,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Threads meet in `commit_smem` or at `consumed`. Pallas would add barriers for reads
            # and writes of shared memory by the program itself, of which there are none.
            unsafe_no_auto_barriers=True,
        ),
        kernel_name=f"q4jax_{name}",
    )
    return kernel(*(operand.array for operand in operands), *firsts).sum(0)
