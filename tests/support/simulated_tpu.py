"""The TPU kernels in Pallas's simulation of a TPU and its memories, which finds data races."""

import contextlib
import dataclasses
import functools

import jax
from jax.experimental.pallas import tpu as pltpu

from q4jax.pallas.tpu import tiles
from q4jax.pallas.tpu.implementation import PallasTPU

# Interpreted kernels are large programs that run once: optimizing them takes longer than running.
QUICK = {"xla_backend_optimization_level": 0}


def kernels(cores=1):
    """The implementation, simulated on a TPU with so many cores, which share parallel steps."""
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    # Where a race can raise, it would leave the simulation in a state to be reset.
    warn = {"on_race": "warn"} if "on_race" in fields else {}
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores, **warn)
    return PallasTPU(interpret=params)


def races_found():
    """Whether a step of the last simulated kernel raced with another or with a copy."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def call(op, *operands, cores=1, **static):
    """The results of an op of the simulated kernels, of which no two steps raced."""
    out = run(op, *operands, cores=cores, **static)
    assert not races_found()
    return out


def run(op, *operands, cores=1, **static):
    """The results of an op of the simulated kernels."""
    function = functools.partial(getattr(kernels(cores), op), **static)
    return jax.block_until_ready(jax.jit(function).lower(*operands).compile(QUICK)(*operands))


@contextlib.contextmanager
def tiles_of(k):
    """Products in tiles of 16 x 128 outputs over `k` columns, so that small ones have many steps.

    Weights are quantized and decoded in tiles of `k` columns too.
    """

    def choose(rows, n, columns, dtype, *, transpose):
        del n, dtype, transpose
        return tiles.Tile(16, 128, min(k, 1 << (columns.bit_length() - 1)), 128)

    def k_tile(columns, most):
        del most
        return min(k, 1 << (columns.bit_length() - 1))

    own = tiles.choose, tiles._k_tile
    tiles.choose, tiles._k_tile = choose, k_tile
    try:
        yield
    finally:
        tiles.choose, tiles._k_tile = own
