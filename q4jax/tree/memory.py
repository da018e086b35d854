"""`memory_report` and `trainable_report`: bytes and counts of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from q4jax.core.html import html_table
from q4jax.linen.adapter import ADAPTERS
from q4jax.linen.variables import COLLECTION
from q4jax.nnx.variables import Frozen4bit, is_variable
from q4jax.ops.params import Params4bit
from q4jax.tree.leaves import find_weights, in_weight, leaves


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes and counts of a model; print it for a table.

    Attributes:
      code_bytes: packed codes of the 4-bit weights.
      scale_bytes: their scales, nested statistics and offsets.
      other_bytes: everything else by top-level part of the model, adapters apart.
      lora_bytes: adapters.
      quantized_weights: elements of the weights that are 4-bit.
      original_bytes: what those weights took before quantization.
      other_weights: elements of everything else, adapters apart.
      trainable: elements of `nnx.LoRAParam` or Linen's "lora" where there are adapters, else of
        `nnx.Param`; those of Linen's "params" that are not 4-bit.
    """

    code_bytes: int
    scale_bytes: int
    other_bytes: dict[str, int]
    lora_bytes: int
    quantized_weights: int
    original_bytes: int
    other_weights: int
    trainable: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return self.code_bytes + self.scale_bytes + sum(self.other_bytes.values()) + self.lora_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the model with its 4-bit weights in their original dtypes."""
        return self.total_bytes - self.code_bytes - self.scale_bytes + self.original_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and scales for each quantized weight; 0 where there is none."""
        stored = 8 * (self.code_bytes + self.scale_bytes)
        return stored / self.quantized_weights if self.quantized_weights else 0.0

    def __str__(self) -> str:
        rows = self._rows()
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"{name:<{width}}  {size:>15}" for name, size in rows]
        return "\n".join([*lines, self._summary()])

    def _repr_html_(self) -> str:
        return html_table(("part", "size"), self._rows(), self._summary())

    def _rows(self) -> list[tuple[str, str]]:
        """The parts that the model has, with their sizes."""
        rows = [
            ("4-bit codes", self.code_bytes),
            ("4-bit scales", self.scale_bytes),
            *((f"full precision: {part}", size) for part, size in self.other_bytes.items()),
            ("LoRA adapters", self.lora_bytes),
            ("total", self.total_bytes),
            ("before quantization", self.dense_bytes),
        ]
        return [(name, f"{size / 1e6:,.3f} MB") for name, size in rows if size]

    def _summary(self) -> str:
        total = self.quantized_weights + self.other_weights
        return (
            f"{self.quantized_weights:,} of {total:,} weights in 4 bits, "
            f"{self.bits_per_weight:.3f} bits each; {self.trainable:,} trainable"
        )


@dataclasses.dataclass(frozen=True)
class TrainableReport:
    """How much of a model is trained; print it for PEFT's line.

    Attributes:
      trainable: elements of `nnx.LoRAParam` where there are adapters, else of `nnx.Param`.
      total: elements of every weight, 4-bit ones and adapters included.
      layers: elements of the adapters by dotted path; empty where there is none.
    """

    trainable: int
    total: int
    layers: dict[str, int]

    @property
    def percent(self) -> float:
        """The share that is trained."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {self.percent:.4f}"
        )


def trainable_report(model: Any) -> TrainableReport:
    """Count the trained parameters of an nnx model, like PEFT's `print_trainable_parameters`.

    Args:
      model: an nnx module, concrete or abstract.

    Raises:
      TypeError: not an nnx module.
      ValueError: it has no weight.

    Examples:
      >>> import q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(256, 256, use_bias=False, rngs=nnx.Rngs(0)))
      >>> print(q4jax.trainable_report(q4jax.add_lora(model, rank=8, alpha=16)))
      trainable params: 4,096 || all params: 69,632 || trainable%: 5.8824
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    layers: dict[str, int] = {}
    for path, variable in params:
        if isinstance(variable, nnx.LoRAParam):
            at = ".".join(map(str, path[:-1]))
            layers[at] = layers.get(at, 0) + int(np.prod(variable.shape))
    dense = sum(int(np.prod(variable.shape)) for _, variable in params)
    total = dense + sum(int(np.prod(weight.quant_state.shape)) for weight in _weights(model))
    if not total:
        raise ValueError("the model has no weight")
    return TrainableReport(sum(layers.values()) or dense, total, layers)


def memory_report(model: Any) -> MemoryReport:
    """Count the bytes by part, the bits per weight and the trained parameters of a model.

    A Variable that is shared counts once. Bytes are those of the logical arrays, so on a mesh
    they are summed over shards, with replicas counted once.

    Args:
      model: an nnx module, or the variables of a Linen model (`{"params": ..., "quant": ...}`, as
        `merge_quantized` returns them, too); concrete or abstract.

    Raises:
      TypeError: neither an nnx module nor a dict.
      ValueError: a dict that has no collection "params" or "quant", or an incomplete 4-bit weight.

    Examples:
      >>> import q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(1024, 1024, rngs=nnx.Rngs(0)))
      >>> print(q4jax.memory_report(model))
      4-bit codes                 0.524 MB
      4-bit scales                0.017 MB
      full precision: bias        0.004 MB
      total                       0.545 MB
      before quantization         4.198 MB
      1,048,576 of 1,049,600 weights in 4 bits, 4.127 bits each; 1,024 trainable
    """
    if isinstance(model, nnx.Module):  # nnx.Dict, too, which is a Mapping
        weights, rest = _of_module(model)
    elif isinstance(model, Mapping):
        weights, rest = _of_variables(model)
    else:
        raise TypeError(
            f"model must be an nnx.Module or a dict of Linen variables, got {type(model).__name__}"
        )
    code_bytes = scale_bytes = lora_bytes = quantized = original = other = lora = params = 0
    other_bytes: dict[str, int] = {}
    for weight in weights:
        state = weight.quant_state
        size = int(np.prod(state.shape))
        quantized += size
        original += size * state.dtype.itemsize
        code_bytes += _nbytes(weight.packed)
        scale_bytes += sum(map(_nbytes, jax.tree.leaves(state, is_leaf=is_variable)))
    for part, kind, leaf in rest:
        size = int(np.prod(leaf.shape))
        if issubclass(kind, nnx.LoRAParam):
            lora_bytes += _nbytes(leaf)
            lora += size
            continue
        other += size
        params += size if issubclass(kind, nnx.Param) else 0
        other_bytes[part] = other_bytes.get(part, 0) + _nbytes(leaf)
    return MemoryReport(
        code_bytes, scale_bytes, other_bytes, lora_bytes, quantized, original, other, lora or params
    )


# What is not in 4 bits: the part of the model, the type of Variable, and the Variable or array.
_Rest = list[tuple[str, type[Any], Any]]


def _of_module(model: nnx.Module) -> tuple[list[Params4bit], _Rest]:
    state = nnx.to_flat_state(nnx.state(model))
    rest = [(str(path[0]), type(v), v) for path, v in state if not isinstance(v, Frozen4bit)]
    return _weights(model), rest


def _of_variables(variables: Mapping[str, Any]) -> tuple[list[Params4bit], _Rest]:
    """Return the parts of Linen's variables: modules of "params", and other collections."""
    if not any(isinstance(variables.get(name), Mapping) for name in ("params", COLLECTION)):
        raise ValueError(
            f"variables must hold a dict 'params' or {COLLECTION!r}, got the keys {list(variables)}"
        )
    found = leaves(variables)
    weights = find_weights(found)
    rest: _Rest = [
        (str(path[0 if kind is nnx.Variable else 1]), kind, leaf)
        for path, leaf in found.items()
        for kind in (_kind(path),)
        if hasattr(leaf, "dtype") and not in_weight(path, weights)  # a collection may hold numbers
    ]
    return list(weights.values()), rest


def _kind(path: Any) -> type[Any]:
    """The type of Variable that NNX has for a leaf of Linen's variables."""
    if path[0] == ADAPTERS or (path[0] == "params" and path[-1] in ("lora_a", "lora_b")):
        return nnx.LoRAParam
    return nnx.Param if path[0] == "params" else nnx.Variable


def _weights(model: nnx.Module) -> list[Params4bit]:
    """Return every 4-bit weight, a shared one once."""
    found: dict[int, Params4bit] = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Params4bit):
            found.setdefault(id(node.packed), node)
    return list(found.values())


def _nbytes(variable: Any) -> int:
    return int(np.prod(variable.shape)) * variable.dtype.itemsize
