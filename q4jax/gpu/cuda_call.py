"""A primitive around a kernel that is lowered for CUDA; elsewhere it is refused in one line.

Where a function for TPUs comes with the kernel, it is lowered there.

The platform is judged when a program is lowered, so that a machine without a GPU can compile for
one. The kernel itself is traced then, too.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import batching, mlir

_kernel_p = Primitive("q4jax_kernel")
_kernel_p.multiple_results = True


def kernel_call(
    name: str,
    function: Callable[..., Any],
    *args: Any,
    tpu: tuple[Callable[..., Any], dict[str, Any]] | None = None,
    **static: Any,
) -> Any:
    """Call `function(*args, **static)` in programs that are compiled for CUDA.

    Args:
      name: the implementation's, for the refusal.
      function: of pytrees of arrays.
      *args: these.
      tpu: a function for TPUs and its other arguments; it computes the same elements in the same
        order, and is traced in programs for TPUs only.
      **static: its other arguments, hashable.

    Raises:
      NotImplementedError: when the program is lowered for another platform; when a Pallas kernel
        would have an array that it cannot address, also by `jax.vmap`.
    """
    leaves, tree = jax.tree.flatten(args)
    call = _Flat(function, tuple(sorted(static.items())), tree)
    on_tpu = None if tpu is None else _Flat(tpu[0], tuple(sorted(tpu[1].items())), tree)
    results = _results(name, call, tuple(map(_struct, leaves)))
    out = _kernel_p.bind(*leaves, name=name, call=call, tpu=on_tpu)
    return jax.tree.unflatten(jax.tree.structure(results), out)


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A function from arrays to a list of arrays, mapped over an axis for each `in_axes`."""

    function: Callable[..., Any]
    static: tuple[tuple[str, Any], ...]
    tree: Any
    axes: tuple[tuple[int | None, ...], ...] = ()

    def whole(self, *leaves: Array) -> Any:
        """Call the function and return its result as it is."""

        def call(*leaves: Array) -> Any:
            return self.function(*jax.tree.unflatten(self.tree, leaves), **dict(self.static))

        for in_axes in self.axes:
            call = jax.vmap(call, in_axes)
        return call(*leaves)

    def __call__(self, *leaves: Array) -> list[Array]:
        return jax.tree.leaves(self.whole(*leaves))

    def mapped(self, in_axes: tuple[int | None, ...]) -> "_Flat":
        """Return the function mapped over one more axis."""
        return dataclasses.replace(self, axes=(*self.axes, in_axes))


@_kernel_p.def_impl
def _impl(*leaves: Array, **params: Any) -> list[Array]:
    return jax.jit(functools.partial(_kernel_p.bind, **params))(*leaves)


@_kernel_p.def_abstract_eval
def _abstract(*avals: Any, name: str, call: _Flat, tpu: _Flat | None) -> list[Any]:
    results = jax.tree.leaves(_results(name, call, tuple(map(_struct, avals))))
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in results]


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


@functools.lru_cache(maxsize=512)
def _results(name: str, call: _Flat, operands: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """Trace the function for the shapes and dtypes of its results."""
    jaxpr, results = jax.make_jaxpr(call.whole, return_shape=True)(*operands)
    _check_arrays(name, jaxpr.jaxpr)
    return results


def _check_arrays(name: str, jaxpr: Any) -> None:
    """Raise NotImplementedError where Pallas would address an array by numbers that overflow.

    It takes 64 bits for arrays of more than 2^32 bytes, and signed 32 bits below.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                _check_arrays(name, inner)
            continue
        for array in (v.aval for v in (*equation.invars, *equation.outvars)):
            if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
                raise NotImplementedError(
                    f"implementation={name!r} cannot address {array.dtype}{list(array.shape)}: "
                    f"its arrays of bytes have at most 2^31 elements, or more than 2^32"
                )


def _batch(
    leaves: Sequence[Array],
    axes: Sequence[int | None],
    *,
    name: str,
    call: _Flat,
    tpu: _Flat | None,
) -> tuple[list[Array], list[int]]:
    mapped = None if tpu is None else tpu.mapped(tuple(axes))
    out = _kernel_p.bind(*leaves, name=name, call=call.mapped(tuple(axes)), tpu=mapped)
    return out, [0] * len(out)


def _lower_cuda(ctx: Any, *operands: Any, name: str, call: _Flat, tpu: _Flat | None) -> Any:
    with warnings.catch_warnings():
        # jax announces the end of Pallas's Triton backend to whoever lowers such a kernel; the
        # user of a layer can do nothing about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


def _lower_tpu(ctx: Any, *operands: Any, name: str, call: _Flat, tpu: _Flat | None) -> Any:
    if tpu is None:
        return _refuse(ctx, name=name, call=call, tpu=tpu)

    def shaped(*leaves: Array) -> list[Array]:
        return [r.reshape(a.shape) for r, a in zip(tpu(*leaves), ctx.avals_out, strict=True)]

    return mlir.lower_fun(shaped, multiple_results=True)(ctx, *operands)


def _refuse(ctx: Any, *_: Any, name: str, call: _Flat, tpu: _Flat | None) -> Any:
    platforms = " and ".join(ctx.module_context.platforms)
    served = "NVIDIA GPUs" if tpu is None else "NVIDIA GPUs and TPUs"
    raise NotImplementedError(
        f"implementation={name!r} runs on {served} and this program is for {platforms}; "
        f"None and 'xla' run anywhere, 'pallas_interpret' simulates the kernels"
    )


batching.primitive_batchers[_kernel_p] = _batch
mlir.register_lowering(_kernel_p, _lower_cuda, platform="cuda")
mlir.register_lowering(_kernel_p, _lower_tpu, platform="tpu")
mlir.register_lowering(_kernel_p, _refuse)
