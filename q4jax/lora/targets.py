"""Where an adapter can be: the layers of a model, 4-bit or dense, and what is put there."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from q4jax.lora.adapter import LINEAR_4BIT, LoRAEmbedding4bit, LoRALinear4bit, LoRAWeight
from q4jax.nnx.converters import foreign_folds, kind_of
from q4jax.nnx.linear import Embedding4bit
from q4jax.nnx.quantized_variable import ForeignWeight


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer that can have an adapter.

    Attributes:
      adapt: (module, path, settings of the adapter) to what takes its place.
      four_bit: its weight is.
      embedding: it is one.
    """

    adapt: Callable[[Any, str, dict[str, Any]], nnx.Module]
    four_bit: bool
    embedding: bool = False


def place_of(module: Any) -> Place | None:
    """How an adapter gets beside a module; None where it cannot."""
    if isinstance(module, LINEAR_4BIT):
        return Place(_linear, True)
    if isinstance(module, Embedding4bit):
        return Place(_embedding, True, embedding=True)
    hosted = {n: v.fold for n, v in vars(module).items() if isinstance(v, ForeignWeight)}
    if hosted:
        return Place(_weights(hosted), True)
    folds = foreign_folds(module)
    if folds:
        return Place(_weights(folds), False)
    kind = kind_of(module)
    if kind is None or kind.why_not is not None:
        return None
    return Place(_embedding if kind.embedding else _linear, False, kind.embedding)


def _linear(module: Any, _: str, settings: dict[str, Any]) -> nnx.Module:
    return LoRALinear4bit(module, **settings)


def _embedding(module: Any, _: str, settings: dict[str, Any]) -> nnx.Module:
    return LoRAEmbedding4bit(module, **{**settings, "dropout": 0.0})


def _weights(folds: dict[str, Any]) -> Callable[[Any, str, dict[str, Any]], nnx.Module]:
    def adapt(module: Any, path: str, settings: dict[str, Any]) -> nnx.Module:
        if settings["dropout"]:
            raise NotImplementedError(
                f"dropout at {path}: a {type(module).__name__} has an adapter of its weight alone, "
                f"and its input is not seen; give it dropout=0"
            )
        for name, fold in folds.items():
            setattr(module, name, LoRAWeight(getattr(module, name), fold, **settings))
        return module

    return adapt
