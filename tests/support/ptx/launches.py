"""Runs functions of JAX on a CPU, with their kernels compiled for a GPU and executed as PTX."""

import dataclasses
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests.support.gpu import mosaic_calls
from tests.support.gpu.targets import compile_for, mesh_of
from tests.support.gpu.triton_calls import calls
from tests.support.ptx.faults import Unknown
from tests.support.ptx.machine import Launch, Machine
from tests.support.ptx.parser import parse

_LAUNCH = re.compile(
    r"q4jax_\w+ grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+) bytes"
)


@dataclasses.dataclass
class Executed:
    """A launch that has run.

    Attributes:
      name: the kernel's.
      ptx: its text.
      launch: how it was started.
      operands, results: arrays.
      counts: what its machine counted.
    """

    name: str
    ptx: str
    launch: Launch
    operands: list[np.ndarray]
    results: list[np.ndarray]
    counts: dict[str, int]


# Calls, and which of their parameters is what they call.
_BODIES = {
    "jit": "jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "custom_partitioning": "call",
}


def _holds_kernels(equation: Any) -> bool:
    if equation.primitive.name in (*_COMPILERS, "q4jax_kernel"):
        return True
    inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
    return any(_holds_kernels(e) for jaxpr in inner for e in getattr(jaxpr, "eqns", ()))


class Executor:
    """Calls functions whose Pallas and Triton kernels run as PTX for a GPU; the rest runs in JAX.

    Attributes:
      gpu: the GPU.
      machine: what runs the PTX.
      launches: what has run, in order.
    """

    def __init__(self, gpu: str, machine: type[Machine] = Machine):
        self.gpu, self.machine = gpu, machine
        self.launches: list[Executed] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; pytrees of arrays in and out."""
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = self._evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    def _evaluate(self, jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, args, strict=True)

        def read(var: Any) -> Any:
            return var.val if hasattr(var, "val") else values[var]

        for equation in jaxpr.eqns:
            operands = [read(var) for var in equation.invars]
            values |= zip(equation.outvars, self._apply(equation, operands), strict=True)
        return [read(var) for var in jaxpr.outvars]

    def _apply(self, equation: Any, operands: list[Any]) -> list[Any]:
        primitive, params = equation.primitive, equation.params
        if primitive.name in _COMPILERS:
            return self.launch(equation, operands)
        if primitive.name == "q4jax_kernel":
            body = jax.make_jaxpr(params["call"])(*operands)
            return self._evaluate(body.jaxpr, body.consts, *operands)
        if primitive.name in _BODIES and _holds_kernels(equation):
            body = params[_BODIES[primitive.name]]
            return self._evaluate(body.jaxpr, body.consts, *operands)
        if _holds_kernels(equation):
            raise Unknown(f"{primitive} around a kernel")
        results = primitive.bind(*operands, **params)
        return results if primitive.multiple_results else [results]

    def launch(self, equation: Any, operands: list[Any]) -> list[Any]:
        """The results of a kernel's call."""
        ptx, launch = _COMPILERS[equation.primitive.name](self.gpu, equation)
        operands = [np.asarray(operand) for operand in operands]
        results = [np.empty(v.aval.shape, v.aval.dtype) for v in equation.outvars]
        machine = self.machine(parse(ptx), launch, operands, results).run()
        found = [machine.memory.result(number) for number in range(len(results))]
        name = equation.params["name"]
        self.launches.append(Executed(name, ptx, launch, operands, found, machine.counts()))
        return [jax.numpy.asarray(result) for result in found]


def execute(ptx: str, launch: Launch, operands, results, **limits) -> list[np.ndarray]:
    """Run a launch and return its results, like `results` in shape and dtype."""
    machine = Machine(parse(ptx), launch, operands, results).run(**limits)
    return [machine.memory.result(number) for number in range(len(results))]


def compile_launch(gpu: str, equation: Any) -> tuple[str, Launch]:
    """The PTX of a `pallas_call` equation for a GPU, and how XLA launches it."""

    kernel, shapes = _alone(equation)
    with tempfile.TemporaryDirectory() as folder:
        # Dumping everything would take ten times as long as compiling.
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        with warnings.catch_warnings():
            # jax announces the end of Pallas's Triton backend.
            warnings.simplefilter("ignore", DeprecationWarning)
            compile_for(mesh_of(gpu), kernel, *shapes, **options)
        [ptx] = pathlib.Path(folder).glob("*.ptx")
        [thunks] = pathlib.Path(folder).glob("*.thunk_sequence.txt")
        *grid, threads, shared = map(int, _LAUNCH.search(thunks.read_text()).groups())
        return ptx.read_text(), Launch(tuple(grid), threads, shared)


def _compile_triton(gpu: str, equation: Any) -> tuple[str, Launch]:
    """The same for a call of jax-triton's."""
    kernel, shapes = _alone(equation)
    [call] = calls(gpu, kernel, *shapes)
    return call.ptx, call.launch


def _compile_mosaic(gpu: str, equation: Any) -> tuple[str, Launch]:
    """The same for a kernel of Mosaic GPU."""
    kernel, shapes = _alone(equation)
    return mosaic_calls.compile_kernel(gpu, kernel, *shapes)


def _alone(equation: Any) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """A function of the equation alone, and the shapes of its arguments."""

    def kernel(*operands: Any) -> Any:
        return equation.primitive.bind(*operands, **equation.params)

    return kernel, [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]


# Primitive -> what compiles it.
_COMPILERS = {
    "pallas_call": compile_launch,
    "mpmd_map": _compile_mosaic,
    "triton_kernel_call": _compile_triton,
}
