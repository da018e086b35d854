"""Launch the Triton kernels, once for all of a batch under `jax.vmap`."""

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
from q4jax.triton.constants import KernelConstants
from q4jax.triton.matmul import linear as linear_kernel
from q4jax.triton.matmul_transpose import linear_transpose as linear_transpose_kernel

# Fusion cannot reach the decode, which is PTX; unset, some versions of Triton warn. PTX as every
# assembler since CUDA 12.9 reads it: Triton would write for its own, and jax has another.
_OPTIONS = {"enable_fp_fusion": True, "ptx_version": 88}
_FEW_ROWS = 16
_ALL_REGISTERS = {"maxnreg": 255}
"""For more rows than few. The assembler would rather spill some, for more programs at a time."""


def linear(x: Array, arrays: WeightArrays, bias: Array | None, *, spec: QuantSpec) -> Array:
    """Return `x @ W.T + bias`: [M, K] -> [M, N] in x's dtype."""
    return _product(spec, False, x, arrays, bias)


def linear_transpose(g: Array, arrays: WeightArrays, *, spec: QuantSpec) -> Array:
    """Return `g @ W`: [M, N] -> [M, K] in g's dtype."""
    return _product(spec, True, g, arrays, None)


def _product(spec: QuantSpec, transpose: bool, *operands: Any) -> Array:
    return _batched(spec, transpose)(*jax.tree.map(lambda a: a[None], operands))[0]


def _batched(spec: QuantSpec, transpose: bool) -> Callable[..., Array]:
    """The product of operands with a leading batch axis, which `jax.vmap` makes longer."""
    product = jax.custom_batching.custom_vmap(functools.partial(_launch, spec, transpose))

    @product.def_vmap
    def rule(size: int, is_batched: Any, *operands: Any) -> tuple[Array, bool]:
        merged = jax.tree.map(functools.partial(_merge, size), operands, tuple(is_batched))
        y = product(*merged)
        return y.reshape(size, -1, *y.shape[1:]), True

    return product


def _merge(size: int, array: Array, is_batched: bool) -> Array:
    """[size or nothing, batch, ...] -> [size * batch, ...]."""
    full = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
    return full.reshape(-1, *full.shape[2:])


def _launch(spec: QuantSpec, transpose: bool, x: Array, arrays: WeightArrays, bias: Any) -> Array:
    """[batch, M, K] -> [batch, M, N], or [batch, M, N] -> [batch, M, K] where `transpose`."""
    named = {
        ("g" if transpose else "x"): x,
        "packed": arrays.packed,
        "absmax": arrays.absmax,
        "nested": arrays.nested_absmax,
        "offset": arrays.offset,
        "bias": bias,
    }
    batch, m, _ = x.shape
    batched = frozenset(n for n, a in named.items() if a is not None and batch > 1)
    constants = KernelConstants.from_problem(m, spec, x.dtype, batched, transpose=transpose)
    tile = constants.tile
    split = tile.splits > 1
    options = _OPTIONS | (_ALL_REGISTERS if tile.m > _FEW_ROWS else {})
    if transpose:
        del named["bias"]
    elif split:
        named["bias"] = None
    named["dynamic_map"] = None if arrays.offset is None else jnp.asarray(codebooks.DYNAMIC_MAP)
    shape = (batch, tile.splits, m, spec.shape[transpose])
    y = jax_triton.triton_call(
        kernel=linear_transpose_kernel if transpose else linear_kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32 if split else x.dtype),
        grid=constants.programs(m, batch),
        name="q4jax_linear_transpose" if transpose else "q4jax_linear",
        num_warps=tile.warps,
        num_stages=tile.stages,
        backend_options=options,
        m=m,
        PLAN=constants,
        **named,
    )
    if not split:
        return y[:, 0]
    total = y.sum(1)
    if bias is not None:
        total += bias.astype(jnp.float32)[:, None]
    return total.astype(x.dtype)
