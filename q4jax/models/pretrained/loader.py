"""Fill the variables of a Llama from Hugging Face's tensors, one tensor at a time."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from q4jax.convert.rules import QuantRule
from q4jax.core.spec import FLOAT_DTYPES
from q4jax.interop.host_arrays import aligned_empty
from q4jax.interop.huggingface.checkpoint import Checkpoint
from q4jax.interop.huggingface.load_save import quantize_tensor
from q4jax.interop.placement import Placement, place
from q4jax.interop.progress import Progress
from q4jax.interop.safetensors.reader import Entry
from q4jax.models.llama.decoder import Llama
from q4jax.models.llama.tensor_names import (
    LEAVES,
    VariablePath,
    is_transposed,
    lead_shape,
    tensor_names,
)
from q4jax.models.pretrained.stacked_weight import WeightStack
from q4jax.nnx.linear import Linear4bit
from q4jax.nnx.traverse import replace_modules

_STRIP = 64


@dataclasses.dataclass(frozen=True)
class Loader:
    """Fills the variables of an abstract Llama.

    Attributes:
      tensors: arrays by name, or a `Checkpoint`, whose weights may be 4-bit.
      quantized: the rule of each linear layer that will be 4-bit, by path; None if it is 4-bit in
        `tensors`.
      dtype: compute dtype of the 4-bit layers whose rule has none.
      sharding: where variables are placed. Their names are those of the model, such as
        `layers.mlp.up_proj.weight.packed`; their shapes include the axis of layers.
      bar: progress bar of the bytes that are read from a `Checkpoint`.
    """

    tensors: Mapping[str, Any]
    quantized: Mapping[str, QuantRule | None]
    dtype: Any
    sharding: Placement | None
    bar: Progress

    def fill(self, model: Llama) -> Llama:
        """Return the model with all variables filled; ValueError names a wrong tensor."""
        config = model.config

        def replace(path: str, module: nnx.Module) -> nnx.Module:
            parts = tuple(path.split("."))
            leaves = [
                leaf
                for leaf, value in vars(module).items()
                if isinstance(value, nnx.Param) and leaf in LEAVES
            ]
            for leaf in leaves:
                at = (*parts, leaf)
                names = tensor_names(at, config)
                if leaf == "kernel" and path in self.quantized:
                    continue
                variable = getattr(module, leaf)
                value = self._dense(at, names, lead_shape(at, config), variable.shape)
                array = place(f"{path}.{leaf}", value, self.sharding)
                setattr(module, leaf, variable.replace(array))
            if path not in self.quantized or not isinstance(module, nnx.Linear):
                return module
            names = tensor_names((*parts, "kernel"), config)
            wanted = (module.out_features, module.in_features)
            rule = self.quantized[path]
            weight = self._weight(names, wanted, lead_shape(parts, config), rule)
            layer = Linear4bit.from_weight(
                weight.finish(f"{path}.weight", self.sharding),
                dtype=self.dtype if rule is None or rule.dtype is None else rule.dtype,
            )
            layer.use_bias, layer.bias = module.use_bias, module.bias
            return layer

        return replace_modules(model, replace)

    def _weight(
        self,
        names: list[str],
        wanted: tuple[int, int],
        lead: tuple[int, ...],
        rule: QuantRule | None,
    ) -> WeightStack:
        """Read or quantize the 4-bit weight of one module, matrix by matrix."""
        stack = WeightStack(lead)
        for name in names:
            if isinstance(self.tensors, Checkpoint) and name in self.tensors.specs:
                state = self.tensors.read_state(name)
                _check_shape(name, state.shape, wanted)
                self.tensors.read_into(name, stack.add(name, state))
            elif rule is None:
                raise ValueError(f"{name} is not 4-bit, but the same weight of another layer is")
            else:
                tensor = self.tensors[name]
                _check_shape(name, tensor.shape, wanted)
                weight = quantize_tensor(name, tensor, rule)
                stack.add(name, weight.quant_state)[...] = np.asarray(weight.packed)
            self._count(name)
        return stack

    def _dense(
        self, path: VariablePath, names: list[str], lead: tuple[int, ...], shape: tuple[int, ...]
    ) -> np.ndarray:
        """Return one dense variable: its tensors, transposed for a kernel and stacked."""
        value, stored = np.empty(0), None
        wanted = shape[len(lead) :]
        for index, name in enumerate(names):
            tensor = self._layout(path, name)
            if tensor.dtype not in FLOAT_DTYPES:
                allowed = ", ".join(dtype.name for dtype in FLOAT_DTYPES)
                raise ValueError(f"{name} is {tensor.dtype}; allowed are {allowed}")
            _check_shape(name, tensor.shape, wanted[::-1] if is_transposed(path) else wanted)
            if stored is None:
                stored = tensor.dtype
                scale = path[-1] == "scale"
                value = aligned_empty(shape, np.dtype(np.float32) if scale else stored)
            if tensor.dtype != stored:
                raise ValueError(
                    f"{name} is {tensor.dtype}, but the same weight of layer 0 is {stored}"
                )
            out = value[np.unravel_index(index, lead)] if lead else value
            if is_transposed(path):
                _copy_transposed(self._array(name, tensor), out)
            elif isinstance(self.tensors, Checkpoint) and out.dtype == stored:
                self.tensors.read_into(name, out)
            else:
                out[...] = self._array(name, tensor)
            self._count(name)
        return value

    def _layout(self, path: VariablePath, name: str) -> Any:
        """Return an object with the dtype and shape of a tensor, without reading a dense one.

        Routers are dense in the model; one that bitsandbytes has quantized is decoded here.
        """
        if not isinstance(self.tensors, Checkpoint):
            return self.tensors[name]
        if name not in self.tensors.specs:
            return self.tensors.tensors.layouts[name]
        if path[-1] != "kernel":
            raise ValueError(f"{name} is 4-bit, but not the weight of a linear layer")
        weight: Any = self.tensors[name]
        return np.asarray(weight.dequantize())

    def _array(self, name: str, layout: Any) -> np.ndarray:
        """Return a tensor, given what `_layout` returned for it."""
        return np.asarray(self.tensors[name] if isinstance(layout, Entry) else layout)

    def _count(self, name: str) -> None:
        if isinstance(self.tensors, Checkpoint):
            self.bar.add(self.tensors.bytes_of(name))


def _copy_transposed(tensor: np.ndarray, out: np.ndarray) -> None:
    """Copy `tensor.T` into `out`, in strips that fit the CPU cache."""
    bits = f"u{tensor.itemsize}"
    tensor, out = tensor.view(bits), out.view(bits)
    for start in range(0, len(tensor), _STRIP):
        out[:, start : start + _STRIP] = tensor[start : start + _STRIP].T


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ValueError(f"{name} is {found}; the config requires {wanted}")
