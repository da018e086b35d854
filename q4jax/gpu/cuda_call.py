"""A primitive around a kernel that is lowered for CUDA only; elsewhere it is refused in one line.

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
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_kernel_p = Primitive("q4jax_kernel")
_kernel_p.multiple_results = True


def kernel_call(name: str, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """Call `function(*args, **static)` in programs that are compiled for CUDA.

    Args:
      name: the implementation's, for the refusal.
      function: of pytrees of arrays.
      *args: these.
      **static: its other arguments, hashable.

    Raises:
      NotImplementedError: when the program is lowered for another platform.
    """
    leaves, tree = jax.tree.flatten(args)
    call = _Flat(function, tuple(sorted(static.items())), tree)
    results = _results(call, tuple(map(_struct, leaves)))
    out = _kernel_p.bind(*leaves, name=name, call=call)
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
def _impl(*leaves: Array, name: str, call: _Flat) -> list[Array]:
    return jax.jit(functools.partial(_kernel_p.bind, name=name, call=call))(*leaves)


@_kernel_p.def_abstract_eval
def _abstract(*avals: Any, name: str, call: _Flat) -> list[Any]:
    results = jax.tree.leaves(_results(call, tuple(map(_struct, avals))))
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in results]


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


@functools.lru_cache(maxsize=512)
def _results(call: _Flat, operands: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """Trace the function for the shapes and dtypes of its results."""
    return jax.eval_shape(call.whole, *operands)


def _batch(
    leaves: Sequence[Array], axes: Sequence[int | None], *, name: str, call: _Flat
) -> tuple[list[Array], list[int]]:
    out = _kernel_p.bind(*leaves, name=name, call=call.mapped(tuple(axes)))
    return out, [0] * len(out)


def _lower_cuda(ctx: Any, *operands: Any, name: str, call: _Flat) -> Any:
    with warnings.catch_warnings():
        # jax announces the end of Pallas's Triton backend to whoever lowers such a kernel; the
        # user of a layer can do nothing about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        return mlir.lower_fun(call, multiple_results=True)(ctx, *operands)


def _refuse(ctx: Any, *_: Any, name: str, call: _Flat) -> Any:
    platforms = " and ".join(ctx.module_context.platforms)
    raise NotImplementedError(
        f"implementation={name!r} runs on NVIDIA GPUs and this program is for {platforms}; "
        f"None and 'xla' run anywhere, 'pallas_interpret' simulates the kernels"
    )


batching.primitive_batchers[_kernel_p] = _batch
mlir.register_lowering(_kernel_p, _lower_cuda, platform="cuda")
mlir.register_lowering(_kernel_p, _refuse)
