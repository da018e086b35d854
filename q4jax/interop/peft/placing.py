"""Which layers of a model the adapters of PEFT's files belong to."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

from q4jax.interop.peft.config import AdapterConfig
from q4jax.interop.peft.names import (
    EXPERT_LAYERS,
    EXPERT_PARAMETERS,
    Index,
    expert_layer,
    locate,
    split_experts,
    stacks_of,
)
from q4jax.interop.peft.patterns import is_named
from q4jax.interop.peft.tensors import WRAPPED, AdapterFiles, Factors, check_rank
from q4jax.lora.adapter import Adapter, kernel_axes_of
from q4jax.lora.targets import Target, target_of
from q4jax.nnx.traverse import iter_modules


@dataclasses.dataclass(frozen=True)
class Values:
    """The adapter of one layer of a stack.

    Attributes:
      name: the module's name in the files.
      a: `[in, rank]`.
      b: `[rank, out]`.
      magnitude: `[out]`, or None.
      alpha: numerator of the scale.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    alpha: float

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.a.shape[1])


class Layers:
    """The layers of a model that can have adapters, by the names that files have for them.

    Args:
      model: a module without adapters.
      prefix: start of the names in the files that the model's names lack.

    Attributes:
      targets: how each layer is adapted, by path. A weight that is adapted by itself has the path
        of its module and its own name.
      modules: the module of each layer, by the same path.
    """

    def __init__(self, model: nnx.Module, prefix: str):
        self.prefix = prefix
        self._stacks = stacks_of(model)
        self.targets: dict[str, Target] = {}
        self.modules: dict[str, Any] = {}
        self._weights: dict[str, str] = {}  # path of a module -> that of its only weight
        for path, module in iter_modules(model):
            if isinstance(module, Adapter):
                raise ValueError("model has adapters already")
            target = target_of(module)
            if target is None:
                continue
            own = [f"{path}.{name}" for name in target.weights]
            for name, at in zip(target.weights, own, strict=True):
                self.targets[at], self.modules[at] = target.only(name), module
            if not own:
                self.targets[path], self.modules[path] = target, module
            elif len(own) == 1:
                self._weights[path] = own[0]
        # Path of a stack of experts -> the path of each of its layers, by transformers' name.
        self._experts: dict[str, dict[str, str]] = {}
        for path in self.targets:
            if leaf := expert_layer(path):
                self._experts.setdefault(path.rpartition(".")[0], {})[leaf] = path

    def place(self, files: AdapterFiles) -> dict[str, dict[Index, Values]]:
        """Return the adapters of each layer by path and index.

        Raises:
          ValueError: the model has no layer for an adapter, or two adapters are of one layer.
          NotImplementedError: an adapter is of a parameter that is not read.
        """
        found: dict[str, dict[Index, Values]] = {}
        for name, factors in files.factors.items():
            for path, index, values in self._entries(name, factors, files.config):
                others = found.setdefault(path, {})
                if index in others:
                    raise ValueError(f"{name} and {others[index].name} are adapters of one layer")
                others[index] = values
        return found

    def _entries(
        self, name: str, factors: Factors, config: AdapterConfig
    ) -> list[tuple[str, Index, Values]]:
        module = name
        while module.endswith(WRAPPED):
            module = module.removesuffix(WRAPPED)
        depth = (len(name) - len(module)) // len(WRAPPED)
        known = {*self.targets, *self._weights, *self._experts}
        place = locate(module, self.prefix, known, self._stacks)
        if place is None:
            raise ValueError(f"the model has no layer that can have the adapter of {name}")
        path = self._weights.get(place.path, place.path)
        if path in self._experts:
            return self._of_experts(name, module, depth, path, place.at, factors, config)
        if depth:
            raise NotImplementedError(f"{name}: several adapters of one layer are not read")
        target = self.targets[path]
        if factors.of_embedding != target.is_embedding:
            kind = "an embedding" if target.is_embedding else "no embedding"
            raise ValueError(f"{name}: the adapter is of another kind of layer; {path} is {kind}")
        a, b, m = factors.a, factors.b, factors.magnitude
        if self._has_batch(path):
            key = f"{module}.{path.rpartition('.')[2]}"
            index = place.at
            return [
                (path, (*index, i), values)
                for i, values in enumerate(_split(name, key, a, b, config))
            ]
        check_rank(name, a, b, config.rank_of(module))
        values = Values(name, a.T, b.T, m, config.alpha_of(module))
        return [(path, place.at, values)]

    def _has_batch(self, path: str) -> bool:
        target = self.targets[path]
        if target.is_embedding:
            return False
        axes = next(iter(target.weights.values()), None)
        return bool((axes or kernel_axes_of(self.modules[path])).lead)

    def _of_experts(
        self,
        name: str,
        module: str,
        depth: int,
        path: str,
        index: Index,
        factors: Factors,
        config: AdapterConfig,
    ) -> list[tuple[str, Index, Values]]:
        """Return the adapters of each expert; the first two layers share one parameter."""
        adapted = [p for p in EXPERT_PARAMETERS if is_named(f"{module}.{p}", config.parameters)]
        if depth >= len(adapted):
            raise ValueError(
                f"{name}: target_parameters={list(config.parameters)} name {len(adapted)} "
                f"parameters of {module}"
            )
        parameter = adapted[-1 - depth]
        own, entries = self._experts[path], []
        whole, gate, up = (own.get(leaf) for leaf in (parameter, *EXPERT_LAYERS[:2]))
        key = f"{module}.{parameter}"
        for i, v in enumerate(_split(name, key, factors.a, factors.b, config)):
            if whole is not None:
                entries.append((whole, (*index, i), v))
                continue
            half = v.b.shape[1] // 2
            for at, b in ((gate, v.b[:, :half]), (up, v.b[:, half:])):
                assert at is not None
                entries.append((at, (*index, i), dataclasses.replace(v, b=b)))
        return entries


def _split(
    name: str, key: str, a: np.ndarray, b: np.ndarray, config: AdapterConfig
) -> list[Values]:
    """Return the adapter of each expert of a parameter that stacks them."""
    rank, alpha = config.rank_of(key), config.alpha_of(key)
    if a.shape[0] % rank or b.shape[1] != a.shape[0]:
        raise ValueError(f"{name}: lora_A {list(a.shape)} does not hold experts of rank {rank}")
    module = key.rpartition(".")[0]
    pairs = zip(*split_experts(a, b, rank, module), strict=True)
    return [Values(name, one, other, None, alpha) for one, other in pairs]
