"""From arrays to a launch, one for a whole batch under `jax.vmap`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jax import Array

from q4jax.core import codebooks
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from q4jax.triton.constants import Plan
from q4jax.triton.matmul import linear as linear_kernel
from q4jax.triton.matmul_transpose import transposed as transposed_kernel

# Fusion cannot reach the decode, which is PTX; unset, some versions of Triton warn. PTX as every
# assembler since CUDA 12.9 reads it: Triton would write for its own, and jax has another.
_OPTIONS = {"enable_fp_fusion": True, "ptx_version": 88}
_FEW_ROWS = 16
_ALL_REGISTERS = {"maxnreg": 255}
"""For more rows than few. The assembler would rather spill some, for more programs at a time."""


def linear(x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec) -> Array:
    """`x @ W.T + bias`: [M, K] -> [M, N] in x's dtype."""
    return _product("linear", spec, x, arrays, bias)


def transposed(g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
    """`g @ W`: [M, N] -> [M, K] in g's dtype."""
    return _product("transposed", spec, g, arrays, None)


def _product(operation: str, spec: QuantSpec, *operands: Any) -> Array:
    return _batched(operation, spec)(*jax.tree.map(lambda a: a[None], operands))[0]


def _batched(operation: str, spec: QuantSpec) -> Callable[..., Array]:
    """The product of operands that have a leading axis for a batch.

    It is 1 long in an operand that all elements of the batch share.
    """
    product = jax.custom_batching.custom_vmap(functools.partial(_launch, operation, spec))

    @product.def_vmap
    def rule(size: int, is_batched: Any, *operands: Any) -> tuple[Array, bool]:
        x, *weight = operands
        is_batched = tuple(is_batched)
        inner = max(
            a.shape[batched]
            for a, batched in zip(*map(jax.tree.leaves, (operands, is_batched)), strict=True)
        )
        if any(jax.tree.leaves(is_batched[1:])):
            merged = jax.tree.map(functools.partial(_merge, size, inner), operands, is_batched)
            y = product(*merged)
            return y.reshape(size, inner, *y.shape[1:]), True
        # The same weights, for more rows.
        rows = x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])
        y = product(rows, *weight)  # [inner, size * M, ...]
        return y.reshape(inner, size, x.shape[2], -1).swapaxes(0, 1), True

    return product


def _merge(outer: int, inner: int, array: Array, is_batched: bool) -> Array:
    """[outer or nothing, inner or 1, ...] -> [outer * inner or 1, ...]."""
    if not is_batched and array.shape[0] == 1:
        return array
    array = array if is_batched else array[None]
    rest = array.shape[2:]
    return jnp.broadcast_to(array, (outer, inner, *rest)).reshape(outer * inner, *rest)


def _launch(operation: str, spec: QuantSpec, x: Array, arrays: WeightArrays, bias: Any) -> Array:
    """[batch, M, K] -> [batch, M, N], or [batch, M, N] -> [batch, M, K]."""
    named = {
        ("x" if operation == "linear" else "g"): x,
        "packed": arrays.packed,
        "absmax": arrays.absmax,
        "nested": arrays.nested_absmax,
        "offset": arrays.offset,
        "bias": bias,
    }
    batch = max(len(a) for a in named.values() if a is not None)
    batched = frozenset(n for n, a in named.items() if a is not None and len(a) > 1)
    m = x.shape[1]
    plan = Plan.of(operation, m, spec, x.dtype, batched)
    split = plan.tile.splits > 1
    options = _OPTIONS | (_ALL_REGISTERS if plan.tile.m > _FEW_ROWS else {})
    if operation == "transposed" or split:
        del named["bias"]
    if operation == "linear" and split:
        named["bias"] = None
    named["dynamic_map"] = None if arrays.offset is None else jnp.asarray(codebooks.DYNAMIC_MAP)
    shape = (batch, plan.tile.splits, m, spec.shape[operation != "linear"])
    y = jax_triton.triton_call(
        kernel=linear_kernel if operation == "linear" else transposed_kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32 if split else x.dtype),
        grid=plan.programs(operation, m, batch),
        name=f"q4jax_{operation}",
        num_warps=plan.tile.warps,
        num_stages=plan.tile.stages,
        backend_options=options,
        m=m,
        PLAN=plan,
        **named,
    )
    if not split:
        return y[:, 0]
    total = y.sum(1)
    if bias is not None:
        total += bias.astype(jnp.float32)[:, None]
    return total.astype(x.dtype)
