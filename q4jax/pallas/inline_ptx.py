"""Inline PTX in Pallas kernels, and what interpret mode runs on CPU instead.

`inline_asm` puts a few PTX instructions into a Triton kernel, one run for each element. XLA's CPU
backend cannot, so a lowering for CPU is registered. It computes the reference in jax.numpy that
comes with the text; the tests compare the two.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import mlir
from jax.typing import DTypeLike

from q4jax.gpu.requirements import triton

_CONSTRAINTS = {"float32": "f", "int32": "r"}


_references: dict[str, Callable[..., Array]] = {}


def inline_asm(
    asm: str, reference: Callable[..., Array], args: Sequence[Array], dtype: DTypeLike
) -> Array:
    """Run PTX on each element: `$0` is the result, `$1`, `$2`, ... the elements of `args`.

    Args:
      asm: the instructions.
      reference: the same as a function of `args`, for interpret mode.
      args: float32 or int32 arrays of one shape.
      dtype: of the result, float32 or int32 (a uint32 would be a type of its own to Triton).
    """
    _references[asm] = reference
    return _bind(asm, args, dtype)


def _bind(asm: str, args: Sequence[Array], dtype: DTypeLike) -> Array:
    letters = [_CONSTRAINTS[np.dtype(d).name] for d in (dtype, *(a.dtype for a in args))]
    [result] = triton().elementwise_inline_asm(
        asm,
        args=list(args),
        constraints="=" + ",".join(letters),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result


@functools.cache
def register_emulation() -> None:
    """Register the CPU lowering of the primitive behind `inline_asm`."""

    def probe(x: Array) -> Array:
        return _bind("{ mul.rn.f32 $0, $1, $1; }", [x], jnp.float32)

    # The primitive has no public name; an equation that it makes has it.
    jaxpr = jax.make_jaxpr(probe)(jax.ShapeDtypeStruct((1,), jnp.float32))
    [equation] = jaxpr.jaxpr.eqns

    def lower(*args: Array, asm: str, result_shape_dtypes: Sequence[Any], **_: Any) -> list[Array]:
        return [_references[asm](*args)]

    rule = mlir.lower_fun(lower, multiple_results=True)
    mlir.register_lowering(equation.primitive, rule, platform="cpu")
