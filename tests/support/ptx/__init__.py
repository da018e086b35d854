"""A machine that executes PTX on a CPU with numpy, and checks what it does.

Read `parser`, `registers`, `global_memory`, `shared_memory` and `machine` in this order; then a
file of `instructions` for each family; then `launches`, which compiles JAX's kernels and runs them.

All threads of all blocks run in lockstep, so that an instruction is a few numpy operations on
arrays with an element a thread. A branch splits the threads into groups. The group that is
furthest behind runs first, which brings the groups together again.

Its results are those of the hardware, except that a tensor core adds in float32 here, in some
order, where hardware may cut off bits of what it aligns.
"""
