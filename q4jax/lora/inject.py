"""Adapters beside frozen layers, and their merge."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from q4jax.convert.rules import compiled, require_matches
from q4jax.lora.adapter import Adapter, LoRAEmbedding4bit, LoRALinear4bit, LoRAWeight, fold_of
from q4jax.lora.targets import place_of
from q4jax.nnx.converters import dequantized, kind_of
from q4jax.nnx.quantized_variable import ForeignWeight, foreign_weight, restore
from q4jax.nnx.traverse import replace_modules, walk_modules
from q4jax.ops.params import Params4bit

__all__ = [
    "Adapter",
    "LoRAEmbedding4bit",
    "LoRALinear4bit",
    "LoRAWeight",
    "MergeErrors",
    "add_lora",
    "merge_lora",
]

M = TypeVar("M")
Targets = str | Sequence[str] | None


def add_lora(
    model: M,
    rank: int,
    alpha: float,
    *,
    targets: Targets = None,
    rslora: bool = False,
    dropout: float = 0.0,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
) -> M:
    r"""A model with an adapter beside each of its 4-bit weights; all arrays are shared.

    Args:
      model: an nnx module; it is left as it was.
      rank: inner width of the adapters, at least 1.
      alpha: the adapters' output is scaled by `alpha / rank`.
      targets: names or dotted paths of the layers to adapt, such as ("q_proj", "v_proj"); or one
        string, a regular expression for the whole path, such as r"layers\..*_proj". Those named
        may also be dense (`nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`) or embeddings (4-bit or
        not). None: every layer with a 4-bit weight that is no embedding.
      rslora: scale by `alpha / sqrt(rank)`, so that ranks compare (arXiv:2312.03732).
      dropout: share of an adapter's input that is zeroed while it is trained: until
        `model.eval()`, and again after `model.train()`. Embeddings have none.
      param_dtype: dtype of the adapters.
      rngs: random streams; None: `nnx.Rngs(0)`.

    Returns:
      The new model. Its outputs are those of `model` until the adapters are trained.

    Raises:
      ValueError: rank is no positive integer, dropout is not in [0, 1), a target matches no layer
        (those that there are are named), targets is no regular expression, or there are adapters
        already.
      NotImplementedError: dropout for a weight that a class told to `register_layer` holds: only
        the weight is adapted there.

    Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314.

    Example:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0))))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> adapters = nnx.DiffState(0, nnx.LoRAParam)
      >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 64))).sum(), argnums=adapters)(model)
      >>> [leaf.shape for leaf in jax.tree.leaves(grads)]
      [(64, 8), (8, 32)]
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
    settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "rslora": rslora, "dropout": dropout}
    settings |= {"param_dtype": param_dtype, "rngs": nnx.Rngs(0) if rngs is None else rngs}
    _require_none(model)
    places = {path: place for path, module in walk_modules(model) if (place := place_of(module))}
    chosen = _choose(places, targets)

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        return places[path].adapt(module, path, settings) if path in chosen else module

    return replace_modules(model, replace)


def _require_none(model: Any) -> None:
    for path, module in walk_modules(model):
        if isinstance(module, Adapter):
            raise ValueError(f"model has an adapter already at {path or '(root)'}")


def _choose(places: dict[str, Any], targets: Targets) -> set[str]:
    """The paths to adapt; ValueError where a target, or none at all, matches."""
    if isinstance(targets, str):
        require_matches([targets], places)
        return {path for path in places if compiled(targets).fullmatch(path)}
    idle: list[str] = []
    if targets is None:
        chosen = {p for p, place in places.items() if place.four_bit and not place.embedding}
    else:
        under = {t: {p for p in places if f".{t}." in f".{p}."} for t in targets}
        chosen = set().union(*under.values())
        idle = [target for target, paths in under.items() if not paths]
    if idle or not chosen:
        missed = f"; no layer is {idle}" if idle else ""
        raise ValueError(
            f"add_lora matched no layer: targets={targets!r}{missed}; layers that can have an "
            f"adapter: {list(places)}"
        )
    return chosen


class MergeErrors(dict[str, float]):
    """The error of each layer by dotted path; prints one a line, the largest first."""

    def __str__(self) -> str:
        ranked = sorted(self.items(), key=lambda item: -item[1])
        return "\n".join(f"{error:.4f}  {path or '(root)'}" for path, error in ranked)


@overload
def merge_lora(model: M, *, requantize: Literal[False] = False) -> M: ...
@overload
def merge_lora(model: M, *, requantize: Literal[True]) -> tuple[M, MergeErrors]: ...
def merge_lora(model: M, *, requantize: bool = False) -> M | tuple[M, MergeErrors]:
    """A model with its adapters merged into the weights.

    Args:
      model: an nnx module with adapters; it is left as it was.
      requantize: False: each adapted layer becomes a dense one (`nnx.Linear` and so on) in the
        dtype its weight was quantized from. True: one that was 4-bit becomes so again, with the
        settings it had, which rounds away part of the adapter.

    Returns:
      The new model; where requantized, also the error of each adapted layer by dotted path:
      |result - merged| / |merged|, Frobenius norms, merged in float32.

    Raises:
      ValueError: the model has no adapter.

    Example:
      >>> import q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> type(q4jax.merge_lora(model)).__name__
      'Linear'
      >>> _, errors = q4jax.merge_lora(model, requantize=True)
      >>> errors[""] < 0.12
      True
    """
    errors = MergeErrors()

    def replace(path: str, module: nnx.Module) -> Any:
        if not isinstance(module, Adapter):
            return module
        merge: Any = _merge_weight if isinstance(module, LoRAWeight) else _merge_layer
        new, found, exact = merge(module, path, requantize)
        error = found.astype(jnp.float32) - exact
        errors[path] = float(jnp.linalg.norm(error.ravel()) / jnp.linalg.norm(exact.ravel()))
        return new

    merged = replace_modules(model, replace)
    if not errors:
        raise ValueError("merge_lora: the model has no adapter; add_lora makes them")
    return (merged, errors) if requantize else merged


def _merge_layer(adapter: Any, path: str, requantize: bool) -> tuple[nnx.Module, Array, Array]:
    """The new layer, its weight, and what that would be without rounding."""
    base = adapter.base
    name, delta = "embedding", adapter.delta()
    if isinstance(adapter, LoRALinear4bit):
        name, delta = "kernel", fold_of(base).unfold(jnp.swapaxes(delta, -1, -2))
    four_bit = dequantized(base)
    dense: Any = nnx.clone(base) if four_bit is None else four_bit
    variable = getattr(dense, name)
    exact = variable[...].astype(jnp.float32) + delta
    setattr(dense, name, variable.replace(exact.astype(variable.dtype)))
    kind = kind_of(dense)
    if not requantize or four_bit is None or kind is None or kind.quantize is None:
        return dense, getattr(dense, name)[...], exact
    layer: Any = kind.quantize(dense, path, {**_settings(base.weight), "dtype": base.dtype})
    layer.implementation = base.implementation
    return layer, getattr(dequantized(layer), name)[...], exact


def _merge_weight(adapter: LoRAWeight, path: str, requantize: bool) -> tuple[Any, Array, Array]:
    """The new Variable or `ForeignWeight`, its array, and that without rounding."""
    base = adapter.base
    hosted = isinstance(base, ForeignWeight)
    variable = restore(base) if hosted else base
    exact = variable[...].astype(jnp.float32) + adapter.spread()
    variable = variable.replace(exact.astype(variable.dtype))
    if not hosted or not requantize:
        return variable, variable[...], exact
    settings = {**_settings(base.weight), "dtype": base.dtype}
    weight = foreign_weight(variable, path, base.fold, **settings)
    return weight, restore(weight)[...], exact


def _settings(weight: Params4bit) -> dict[str, Any]:
    spec = weight.quant_state.spec
    return {
        "quant_type": spec.quant_type,
        "blocksize": spec.blocksize,
        "compress_statistics": spec.nested,
    }
