"""Refuse, by an op's name, what `custom_partitioning` cannot do: TPUs, and derivatives."""

from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

_refuse_p = Primitive("q4jax_refuse_auto_axes")
_refuse_p.multiple_results = True


def refuse_auto_axes(name: str, operands: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the operands of an op that `custom_partitioning` would partition.

    Lowering this for several TPUs raises a NotImplementedError that says what to write instead, and
    differentiating it a TypeError; otherwise it leaves no trace in the program.

    Args:
      name: the op's name.
      operands: its operands.
    """
    return tuple(_refuse_p.bind(*operands, name=name))


@_refuse_p.def_impl
def _(*operands: Array, name: str) -> Any:
    return jax.jit(refuse_auto_axes, static_argnums=0)(name, operands)


@_refuse_p.def_abstract_eval
def _(*operands: Any, name: str) -> list[Any]:
    return list(operands)


def _lower(context: Any, *operands: Any, name: str) -> list[Any]:
    return list(operands)


def _lower_tpu(context: Any, *operands: Any, name: str) -> list[Any]:
    # Under `jit`, how many devices the program is for; within `shard_map` there is no such number.
    devices = getattr(context.module_context.axis_context, "num_devices", None)
    if devices is not None and devices > 1:
        raise NotImplementedError(
            f"4-bit weights (the operation {name!r}) on {devices} TPUs with Auto mesh axes: XLA "
            "for TPU has no custom_partitioning. Make the axes Explicit, by jax.make_mesh(..., "
            "axis_types=(jax.sharding.AxisType.Explicit,) * n) and jax.set_mesh, for models of "
            "q4jax.models too, or call the operation in a jax.shard_map over all axes"
        )
    return list(operands)


def _differentiate(operands: Any, tangents: Any, *, name: str) -> Any:
    raise TypeError(
        f"{name} of a 4-bit weight has no derivative. matmul_4bit has one with respect to x and "
        "the bias; put jax.lax.stop_gradient around what is quantized or dequantized, or train "
        "LoRA adapters (add_lora)"
    )


ad.primitive_jvps[_refuse_p] = _differentiate
mlir.register_lowering(_refuse_p, _lower)
mlir.register_lowering(_refuse_p, _lower_tpu, platform="tpu")
