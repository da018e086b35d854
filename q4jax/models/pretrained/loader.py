"""Fill the variables of a Llama from Hugging Face's tensors, one tensor at a time."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.tensor_names import Source, TensorNames
from q4jax.models.pretrained.stacked_weight import WeightStack
from q4jax.nnx.linear import Linear4bit
from q4jax.nnx.traverse import replace_modules

_THREADS = 4
_STRIP = 32  # bytes: more rows than the cache has ways would evict each other


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
    _pool: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS), init=False
    )

    def fill(self, model: Llama) -> Llama:
        """Return the model with all variables filled; ValueError names a wrong tensor."""
        with self._pool:
            return self._fill(model)

    def _fill(self, model: Llama) -> Llama:
        names = TensorNames.of(model)

        def replace(path: str, module: nnx.Module) -> nnx.Module:
            parts = tuple(path.split(".")) if path else ()
            for leaf, variable in list(vars(module).items()):
                if not isinstance(variable, nnx.Param):
                    continue
                if leaf == "kernel" and path in self.quantized:
                    continue
                source = names.source((*parts, leaf))
                value = self._dense(leaf, source, variable.shape, variable.dtype)
                array = place(f"{path}.{leaf}", value, self.sharding)
                setattr(module, leaf, variable.replace(array))
            if path not in self.quantized or not isinstance(module, nnx.Linear):
                return module
            source = names.source((*parts, "kernel"))
            wanted = (module.out_features, module.in_features)
            rule = self.quantized[path]
            lead = module.kernel.shape[:-2]
            weight = self._weight(source, wanted, lead, rule)
            layer = Linear4bit.from_weight(
                weight.finish(f"{path}.weight", self.sharding),
                dtype=self.dtype if rule is None or rule.dtype is None else rule.dtype,
            )
            layer.use_bias, layer.bias = module.use_bias, module.bias
            return layer

        return replace_modules(model, replace)

    def _weight(
        self,
        source: Source,
        wanted: tuple[int, int],
        lead: tuple[int, ...],
        rule: QuantRule | None,
    ) -> WeightStack:
        """Read or quantize the 4-bit weight of one module, matrix by matrix."""
        stack = WeightStack(lead)
        reads: list[Future[None]] = []
        inner = lead[len(source.lead) :]  # of experts in one tensor
        shape = wanted if source.transposed else wanted[::-1]
        for name in source.names:
            if isinstance(self.tensors, Checkpoint) and name in self.tensors.specs:
                state = self.tensors.read_state(name)
                _check_shape(name, state.shape, wanted)
                codes = stack.add(name, state)
                reads.append(self._pool.submit(self.tensors.read_into, name, codes))
            elif rule is None:
                raise ValueError(f"{name} is not 4-bit, but the same weight of another layer is")
            else:
                tensor = self.tensors[name]
                _check_shape(name, tensor.shape, (*inner, *shape))
                for matrix in np.asarray(tensor).reshape(-1, *shape):
                    matrix = matrix if source.transposed else np.ascontiguousarray(matrix.T)
                    weight = quantize_tensor(name, matrix, rule)
                    stack.add(name, weight.quant_state)[...] = np.asarray(weight.packed)
            self._count(name)
        for read in reads:
            read.result()
        return stack

    def _dense(self, leaf: str, source: Source, shape: tuple[int, ...], made: Any) -> np.ndarray:
        """Return one dense variable: its tensors, transposed for a kernel and stacked."""
        value, stored = np.empty(0), None
        wanted = shape[len(source.lead) :]
        turned = (*wanted[:-2], *wanted[-2:][::-1]) if source.transposed else wanted
        for index, name in enumerate(source.names):
            tensor = self._layout(leaf, name, source)
            if tensor.dtype not in FLOAT_DTYPES:
                allowed = ", ".join(dtype.name for dtype in FLOAT_DTYPES)
                raise ValueError(f"{name} is {tensor.dtype}; allowed are {allowed}")
            _check_shape(name, tensor.shape, turned)
            if stored is None:
                stored = tensor.dtype
                # What the model computes in float32 is kept so.
                value = aligned_empty(shape, made if made == np.float32 else stored)
            if tensor.dtype != stored:
                raise ValueError(
                    f"{name} is {tensor.dtype}, but the same weight of layer 0 is {stored}"
                )
            at: Any = (*np.unravel_index(index, source.lead), ...) if source.lead else ...
            out = value[at]
            if source.transposed:
                matrices = self._array(name, tensor).reshape(-1, *turned[-2:])
                for matrix, part in zip(matrices, out.reshape(-1, *wanted[-2:]), strict=True):
                    self._copy_transposed(matrix.astype(out.dtype, copy=False), part)
            elif isinstance(self.tensors, Checkpoint) and out.dtype == stored:
                self.tensors.read_into(name, out)
            else:
                out[...] = self._array(name, tensor)
            self._count(name)
        return value

    def _copy_transposed(self, tensor: np.ndarray, out: np.ndarray) -> None:
        """Copy `tensor.T` into `out`, in strips that fit the CPU cache."""
        bits, rows = f"u{tensor.itemsize}", _STRIP // tensor.itemsize
        tensor, out = tensor.view(bits), out.view(bits)

        def copy(part: int) -> None:
            share = -(-len(tensor) // (_THREADS * rows)) * rows
            for start in range(part * share, min((part + 1) * share, len(tensor)), rows):
                strip = slice(start, start + rows)
                out[:, strip] = tensor[strip].T

        list(self._pool.map(copy, range(_THREADS)))

    def _layout(self, leaf: str, name: str, source: Source) -> Any:
        """Return an object with the dtype and shape of a tensor, without reading a dense one.

        Routers are dense in the model; one that bitsandbytes has quantized is decoded here.
        """
        if not isinstance(self.tensors, Checkpoint):
            return self.tensors[name]
        if name not in self.tensors.specs:
            return self.tensors.layout(name)
        if leaf != "kernel":
            raise ValueError(f"{name} is 4-bit, but not the weight of a linear layer")
        weight: Any = self.tensors[name]
        matrix = np.asarray(weight.dequantize())
        return matrix if source.transposed else matrix.T

    def _array(self, name: str, layout: Any) -> np.ndarray:
        """Return a tensor, given what `_layout` returned for it."""
        return np.asarray(self.tensors[name] if isinstance(layout, Entry) else layout)

    def _count(self, name: str) -> None:
        if isinstance(self.tensors, Checkpoint):
            self.bar.add(self.tensors.bytes_of(name))


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ValueError(f"{name} is {found}; the config requires {wanted}")
