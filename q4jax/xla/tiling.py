"""Tiles of a weight for XLA's CPU backend: sizes, the loop over them, decoding."""

import functools
import importlib.resources
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from q4jax.core import codebooks


@functools.cache
def _table() -> dict[str, dict[str, list[list[int]]]]:
    """op -> dtype -> [[largest M, elements a tile, 1 to compute in float32], ...], M ascending."""
    return json.loads(importlib.resources.files("q4jax").joinpath("xla", "tuning.json").read_text())


@functools.cache
def has_bfloat16_dot() -> bool:
    """Return whether this CPU multiplies bfloat16; elsewhere float32 dots are faster."""
    try:
        with open("/proc/cpuinfo") as info:
            return "avx512_bf16" in info.read()
    except OSError:
        return False


def choose(op: str, m: int, dtype: Any) -> tuple[int, bool]:
    """Look up the elements of a tile, and whether to convert operands to float32 before the dot.

    Args:
      op: "linear" or "linear_transpose".
      m: rows of the activation.
      dtype: the activation's.
    """
    name = jnp.dtype(dtype).name
    if name == "bfloat16":
        name += "_native" if has_bfloat16_dot() else "_emulated"
    rows_of = _table()[op][name]
    _, elements, upcast = next((row for row in rows_of if m <= row[0]), rows_of[-1])
    return elements, bool(upcast)


def fold(n: int, size: int, tile: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """Run `carry = tile(start, size, carry)` over [0, n): the odd rest first, then full tiles."""
    rest = n % size
    if rest:
        carry = tile(0, rest, carry)
    if n - rest == size:
        return tile(rest, size, carry)
    if n < size:
        return carry

    def body(i, carry):
        # Some XLA versions take any loop without library calls for a small one and run it on a
        # single thread. A sort of two numbers, in effect a no-op, is such a call.
        i = lax.sort(jnp.stack([i, i]))[0]
        return tile(rest + i * size, size, carry)

    return lax.fori_loop(0, n // size, body, carry)


def _pairs(quant_type: str) -> Array:
    """The two values that each byte decodes to, [256, 2]."""
    code = codebooks.CODEBOOKS[quant_type].values
    return jnp.asarray(np.stack([np.repeat(code, 16), np.tile(code, 16)], axis=1))


def decode(packed: Array, absmax: Array, *, quant_type: str, dtype: Any) -> Array:
    """Decode codes [R, K/2] and scales [R, K/blocksize] to [R, K], rounded once to dtype."""
    values = _pairs(quant_type).at[packed].get(mode="promise_in_bounds")  # [R, K/2, 2]
    blocks = values.reshape(*absmax.shape, -1) * absmax[..., None]
    return blocks.reshape(packed.shape[0], -1).astype(dtype)


def as_bits(x: Array) -> Array:
    """16-bit floats as integers; of floats XLA's CPU backend would convert all before a slice."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def as_float(bits: Array, dtype: Any) -> Array:
    """The inverse of `as_bits`."""
    return lax.bitcast_convert_type(bits, dtype) if dtype.itemsize == 2 else bits
