"""The adapters of a model under the names that PEFT has for them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from q4jax.interop.peft.names import (
    EXPERT_LAYERS,
    EXPERT_PARAMETERS,
    ROUTERS,
    Index,
    Stacks,
    expert_layer,
    join_experts,
    numbered,
    with_prefix,
)
from q4jax.interop.peft.tensors import WRAPPED
from q4jax.lora.adapter import Adapter, LoRAEmbedding4bit, kernel_axes_of, scale_of
from q4jax.lora.weight import LoRAWeight
from q4jax.nnx.quantized_variable import QuantizedVariable

# Names of the layers of a stack, with their indices, of its path and leading axes.
Layers = Callable[[str, Index], Iterator[tuple[str, Index]]]
Names = Callable[[str], str | Sequence[str]]
"""The name in the files of a module, by its path; or those of several modules that the layer is at
once, one after the other along its output."""


@dataclasses.dataclass(frozen=True)
class Named:
    """One adapter of PEFT's files.

    Attributes:
      module: name of the module, with a `.base_layer` for each adapter around this one.
      key: the name that patterns of rank and alpha are compared with.
      a: `[in, rank]`, or that of all experts of a parameter.
      b: `[rank, out]`, likewise.
      rank: the rank.
      alpha: numerator of the scale.
      magnitude: `[out]`, or None.
      parameter: the parameter that is adapted by its own name; empty: the module is adapted.
      of_embedding: whether the module is an embedding.
      is_partial: whether other layers of its stack have no adapter.
    """

    module: str
    key: str
    a: np.ndarray
    b: np.ndarray
    rank: int
    alpha: float
    magnitude: np.ndarray | None = None
    parameter: str = ""
    of_embedding: bool = False
    is_partial: bool = False

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the tensors by the ends of their names."""
        if self.of_embedding:
            return {"lora_embedding_A": self.a.T, "lora_embedding_B": self.b.T}
        found = {"lora_A.weight": self.a.T, "lora_B.weight": self.b.T}
        if self.magnitude is not None:
            found["lora_magnitude_vector"] = self.magnitude
        return found


class _Arrays:
    """The arrays of an adapter on the host."""

    def __init__(self, adapter: Any):
        self.a, self.b = np.asarray(adapter.lora_a[...]), np.asarray(adapter.lora_b[...])
        self.magnitude = None if adapter.magnitude is None else np.asarray(adapter.magnitude[...])
        self.lead: Index = self.a.shape[:-2]
        self._adapter = adapter

    def part(self, index: Index) -> tuple[int, float]:
        """Return the rank and alpha of one layer; rank 0 where it has no adapter."""
        whole = self._adapter
        if whole.parts is None:
            return whole.rank, whole.alpha
        rank, alpha = (
            whole.parts[int(np.ravel_multi_index(index, self.lead))] if index else whole.parts[0]
        )
        if rank and (self.a[index][:, rank:].any() or self.b[index][rank:].any()):
            # Its padding has been filled: it has the rank of the stack.
            scale = scale_of(rank, alpha, whole.rslora)
            return whole.rank, scale / scale_of(whole.rank, 1.0, whole.rslora)
        return rank, alpha

    def values(self, index: Index) -> tuple[np.ndarray, np.ndarray, int, float]:
        """Return `[in, rank]`, `[rank, out]`, rank and alpha of one layer."""
        rank, alpha = self.part(index)
        return self.a[index][:, :rank], self.b[index][:rank], rank, alpha


def name_adapters(
    modules: dict[str, Any],
    adapters: dict[str, Any],
    prefix: str,
    stack: str,
    stacks: Stacks,
    names: Names = lambda path: path,
) -> list[Named]:
    """Return each adapter under PEFT's name; modules and adapters are by path.

    Raises:
      ValueError: a stacked layer has no part `stack` in its name; a layer that has several names
        cannot be split evenly.
      NotImplementedError: PEFT has no such adapter.
    """

    def layers(name: str, lead: Index) -> Iterator[tuple[str, Index]]:
        return numbered(name, lead, stack, stacks, prefix)

    named: list[Named] = []
    experts: dict[str, dict[str, Any]] = {}
    for path, adapter in adapters.items():
        parent, _, leaf = path.rpartition(".")
        own = names_of(path, names)
        expert = expert_layer(own[0])
        if expert and adapter.sizes()[0]:
            experts.setdefault(own[0].rpartition(".")[0], {})[expert] = adapter
            continue
        if isinstance(adapter, LoRAWeight) and _is_only_weight(modules.get(parent), adapter):
            own = names_of(parent, names)
        parts = [_of_layer(with_prefix(n, prefix), leaf, adapter, stack, layers) for n in own]
        for i, part in enumerate(parts):
            named += part if len(own) == 1 else (_split(entry, i, own) for entry in part)
    for parent, group in experts.items():
        named += _of_experts(with_prefix(parent, prefix), group, layers)
    return named


def names_of(path: str, names: Names) -> tuple[str, ...]:
    """Return the names of a module, one or several."""
    found = names(path)
    return (found,) if isinstance(found, str) else tuple(found)


def _split(entry: Named, i: int, names: tuple[str, ...]) -> Named:
    """Return the part of an adapter that is the `i`-th of several modules."""
    if entry.parameter or entry.of_embedding:
        raise NotImplementedError(f"{entry.module}: only a linear layer can be several: {names}")
    width, rest = divmod(entry.b.shape[1], len(names))
    if rest:
        raise ValueError(f"{entry.b.shape[1]} outputs are not {len(names)} even parts: {names}")
    at = slice(i * width, (i + 1) * width)
    magnitude = None if entry.magnitude is None else entry.magnitude[at]
    return dataclasses.replace(entry, b=entry.b[:, at], magnitude=magnitude)


def _is_only_weight(module: Any, weight: LoRAWeight) -> bool:
    """Return whether no other weight of a module can have an adapter."""
    others = [v for v in vars(module).values() if v is not weight]
    return not any(
        isinstance(v, LoRAWeight | QuantizedVariable)
        or (isinstance(v, nnx.Param) and len(v.shape) >= len(weight.base.shape))
        for v in others
    )


def _of_layer(name: str, leaf: str, adapter: Any, stack: str, layers: Layers) -> Iterator[Named]:
    arrays = _Arrays(adapter)
    batch = _batch_axes(adapter)
    lead = arrays.lead[: len(arrays.lead) - batch]
    is_partial = adapter.parts is not None and any(rank == 0 for rank, _ in adapter.parts)
    for module, index in layers(name, lead):
        if batch:
            parameter = leaf if isinstance(adapter, LoRAWeight) else "weight"
            yield _stacked(module, module, parameter, [arrays], index, adapter, is_partial)
            continue
        a, b, rank, alpha = arrays.values(index)
        if not rank:
            continue
        is_router = isinstance(adapter, LoRAWeight) and module.rpartition(".")[2] in ROUTERS
        yield Named(
            module,
            f"{module}.weight" if is_router else module,
            *(a, b, rank, alpha),
            magnitude=None if arrays.magnitude is None else arrays.magnitude[index],
            parameter=_short(f"{module}.weight", stack, is_partial) if is_router else "",
            of_embedding=isinstance(adapter, LoRAEmbedding4bit),
            is_partial=is_partial,
        )


def _batch_axes(adapter: Any) -> int:
    """The number of leading axes that the layer itself has, such as that of experts."""
    if isinstance(adapter, LoRAEmbedding4bit):
        return 0
    axes = adapter.kernel_axes if isinstance(adapter, LoRAWeight) else kernel_axes_of(adapter.base)
    return len(axes.lead)


def _of_experts(name: str, own: dict[str, Any], layers: Layers) -> Iterator[Named]:
    arrays = {leaf: _Arrays(adapter) for leaf, adapter in own.items()}
    adapter = next(iter(own.values()))
    lead = next(iter(arrays.values())).lead[:-1]
    joint, down = EXPERT_PARAMETERS
    sharing = (joint,) if joint in arrays else EXPERT_LAYERS[:2]
    groups = {joint: [arrays.get(leaf) for leaf in sharing], down: [arrays.get(down)]}
    whole = {
        parameter: all(any(_is_there(one, i) for one in group) for i in np.ndindex(*lead))
        for parameter, group in groups.items()
    }
    for module, index in layers(name, lead):
        # A layer of the stack may have adapters of one parameter only, or of none.
        present = [p for p, group in groups.items() if any(_is_there(one, index) for one in group)]
        for depth, parameter in zip(reversed(range(len(present))), present, strict=True):
            is_partial = not whole[parameter]
            parts = module, parameter, groups[parameter], index, adapter, is_partial
            yield _stacked(module + depth * WRAPPED, *parts)


def _is_there(arrays: _Arrays | None, index: Index) -> bool:
    """Return whether a layer of a stack has an adapter on one of its experts."""
    return arrays is not None and any(
        arrays.part((*index, *i))[0] for i in np.ndindex(*arrays.lead[len(index) :])
    )


def _stacked(
    name: str,
    module: str,
    parameter: str,
    group: list[_Arrays | None],
    index: Index,
    adapter: Adapter,
    is_partial: bool,
) -> Named:
    """Return the adapter of a parameter that stacks experts, and layers beside each other."""
    present = [one for one in group if one is not None]
    if any(one.magnitude is not None for one in present):
        raise NotImplementedError(f"{module}: PEFT has no DoRA for experts")
    shared = len(present) == len(group) and all(
        np.array_equal(one.a[index], present[0].a[index]) for one in present
    )
    rslora = adapter.rslora
    ranks = [one.a.shape[-1] for one in present]
    rank = ranks[0] if shared else sum(ranks)
    scales = [_scales(one, index, rslora) for one in present]
    scale = max(scales, key=lambda s: np.abs(s).max()).ravel()
    largest = float(scale[np.abs(scale).argmax()]) or 1.0
    a, b, start = [], [], 0
    outputs = present[0].b.shape[-1]
    for one in group:
        experts = present[0].a[index].shape[0]
        block = np.zeros((experts, rank, outputs), present[0].b.dtype)
        if one is not None:
            factor = _scales(one, index, rslora)[..., None, None] / np.float32(largest)
            end = start + one.b.shape[-2]
            block[:, start:end] = one.b[index] * factor.astype(one.b.dtype)
            if not shared:
                start = end
                a.append(one.a[index])
        b.append(block)
    joined = present[0].a[index] if shared else np.concatenate(a, axis=-1)
    flat_a, flat_b = join_experts(joined, np.concatenate(b, axis=-1), module)
    alpha = largest / scale_of(rank, 1.0, rslora)
    full = f"{module}.{parameter}"
    return Named(
        name,
        full,
        *(flat_a.T, flat_b.T, rank, alpha),
        parameter=_short(full, "layers", is_partial),
        is_partial=is_partial,
    )


def _scales(arrays: _Arrays, index: Index, rslora: bool) -> np.ndarray:
    """Return the scale of each expert, float32; 0 where it has no adapter."""
    experts = range(arrays.a[index].shape[0])
    parts = (arrays.part((*index, e)) for e in experts)
    scales = [scale_of(rank, alpha, rslora) if rank else 0.0 for rank, alpha in parts]
    return np.asarray(scales, np.float32)


def _short(parameter: str, stack: str, is_partial: bool) -> str:
    """Return the name of a parameter, without the number of its layer where all layers have it."""
    _, mark, tail = parameter.partition(f"{stack}.")
    number, dot, rest = tail.partition(".")
    return rest if mark and dot and number.isdecimal() and not is_partial else parameter
