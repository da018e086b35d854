"""The implementations under test: the reference, and everything in q4jax and its registry."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.core import blockwise
from q4jax.native import library
from q4jax.ops import registry
from q4jax.triton import requirements
from q4jax.xla.tpu import ops as tpu
from tests.support import simulated_tpu
from tests.support.simulated_tpu import QUICK


class Reference:
    """The plain jax.numpy meaning, as an implementation."""

    name = "reference"
    takes_stacks = False
    double_quantize = staticmethod(blockwise.double_quantize)

    def quantize(self, w, *, spec):
        return blockwise.in_layout(w.shape, *blockwise.quantize_flat(w, spec), spec)

    def dequantize(self, arrays, *, spec, dtype):
        return blockwise.dequantize(arrays, spec, dtype)

    def linear(self, x, arrays, bias, *, spec):
        w = blockwise.dequantize(arrays, spec, x.dtype)
        y = jnp.dot(x, w.T, preferred_element_type=jnp.float32)
        return (y if bias is None else y + bias[None].astype(jnp.float32)).astype(x.dtype)

    def linear_transpose(self, g, arrays, *, spec):
        w = blockwise.dequantize(arrays, spec, g.dtype)
        return jnp.dot(g, w, preferred_element_type=jnp.float32).astype(g.dtype)


class XLAForTPU:
    """What "xla" is on TPU, in operations that every platform has."""

    name = "xla_for_tpu"
    quantize = staticmethod(tpu.quantize)
    double_quantize = staticmethod(tpu.double_quantize)
    dequantize = staticmethod(tpu.dequantize)
    linear = staticmethod(tpu.linear)
    linear_transpose = staticmethod(tpu.linear_transpose)


@dataclasses.dataclass(frozen=True)
class Variant:
    """An implementation in one of its settings.

    Attributes:
      name: its id.
      public: the value of `implementation=` that reaches it; None where none does.
      run: a function from (op, *operands, **static) to the op's results.
      context: what surrounds a call of `run` or of a public function.
      skip: why it cannot run here, or None.
    """

    name: str
    public: str | None
    run: Callable[..., Any]
    context: Callable[[], Any] = contextlib.nullcontext
    skip: str | None = None


@functools.lru_cache(4096)
def _jitted(implementation: Any, op: str, static: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(getattr(implementation, op), **dict(static)))


def _run(implementation, op, *operands, **static):
    function = _jitted(implementation, op, tuple(sorted(static.items())))
    if implementation.name in ("pallas_interpret", "pallas_tpu_interpret"):
        return function.lower(*operands).compile(QUICK)(*operands)
    return function(*operands)


@functools.cache
def _triton_process():
    """A process in which Triton is interpreted, which changes it for all that import it."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        pool.submit(int).result()  # starts it
    finally:
        del os.environ["TRITON_INTERPRET"]
    return pool


def _run_triton(op, *operands, **static):
    host = jax.tree.map(np.asarray, operands)
    return _triton_process().submit(_in_triton_process, op, host, static).result()


def _in_triton_process(op, operands, static):
    from tests.support.gpu import triton_interpreter

    return triton_interpreter.run(op, operands, static)


def _runs_here(implementation: Any) -> str | None:
    """The reason why an implementation cannot run on this platform, or None."""
    spec = registry.QuantSpec("nf4", 64, 0, "float32", (1, 64))
    arrays = blockwise.WeightArrays(
        jnp.zeros((1, 32), jnp.uint8), jnp.ones((1, 1), jnp.float32), None, None
    )
    try:
        _run(implementation, "linear", jnp.ones((1, 64), jnp.float32), arrays, None, spec=spec)
    except NotImplementedError as error:
        return str(error)
    return None


@functools.cache
def variants() -> list[Variant]:
    """The reference, "xla" for TPUs, and all that are registered; "native" once for each ISA."""
    found = [
        Variant(implementation.name, None, functools.partial(_run, implementation))
        for implementation in (Reference(), XLAForTPU())
    ]
    for name, implementation in registry.IMPLEMENTATIONS.items():
        run = functools.partial(_run, implementation)
        if name == "native" and library.status().available:
            for isa in library.status().available:
                use = functools.partial(library.use_isa, isa)
                found.append(Variant(f"native_{isa}", name, run, use))
        elif name == "pallas_tpu_interpret":
            # Its own tiles are programs of tens of thousands of operations to XLA.
            tiles = functools.partial(simulated_tpu.tiles_of, 256)
            found.append(Variant(name, name, run, tiles, skip=_runs_here(implementation)))
        elif name == "triton":
            missing = requirements._missing() or None
            found.append(Variant("triton_interpreted", None, _run_triton, skip=missing))
        else:
            found.append(Variant(name, name, run, skip=_runs_here(implementation)))
    return found


def params(which: Callable[[Variant], bool] = lambda _: True) -> list[Any]:
    """The variants that can run here, as parameters of a test."""
    chosen = [v for v in variants() if not v.skip and which(v)]
    # What runs on no CPU is the same with each version of Python, and takes long.
    return [
        pytest.param(v, id=v.name, marks=[pytest.mark.slow] * ("tpu" in v.name)) for v in chosen
    ]


def unsupported(variant: Variant, error: NotImplementedError) -> None:
    """Skip a case that an implementation refuses, after checking how it says so."""
    text = str(error)
    name = variant.public or variant.name.partition("_")[0]
    assert f"implementation='{name}'" in text and "\n" not in text, text
    pytest.skip(text)
