"""`add_lora`: add LoRA adapters to the layers of a model."""

from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from q4jax.convert.targets import Targets, check_adapter, choose_targets
from q4jax.core.argument_names import name_ours
from q4jax.lora.adapter import Adapter
from q4jax.lora.targets import target_of
from q4jax.nnx.traverse import check_module, iter_modules, replace_modules

M = TypeVar("M")


@name_ours
def add_lora(
    model: M,
    rank: int,
    alpha: float,
    *,
    targets: Targets = None,
    rslora: bool = False,
    dropout: float = 0.0,
    dora: bool = False,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
) -> M:
    r"""Return a model with a LoRA adapter on each 4-bit layer, which shares all arrays.

    Args:
      model: an nnx module; it is not changed.
      rank: inner width of the adapters, at least 1.
      alpha: the adapters' output is scaled by `alpha / rank`.
      targets: names or dotted paths of the layers to adapt, such as ("q_proj", "v_proj"); or one
        string, a regular expression for the whole path, such as r"layers\..*_proj". Targets may be
        dense layers (`nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`) and embeddings, 4-bit or
        dense. None takes every layer with a 4-bit weight but embeddings.
      rslora: whether to scale by `alpha / sqrt(rank)`, so that ranks compare (arXiv:2312.03732).
      dropout: share of an adapter's input that is zeroed in training, that is until `model.eval()`
        and again after `model.train()`. Embeddings have no dropout.
      dora: whether the norms of the adapted weights' columns are trained too (DoRA,
        arXiv:2402.09353). Every call decodes the weights once more, to compute their norms.
      param_dtype: dtype of the adapters.
      rngs: random streams; None takes `nnx.Rngs(0)`.

    Returns:
      The new model. Its outputs are those of `model` until the adapters are trained.

    Raises:
      ValueError: rank is not a positive integer; dropout is not in [0, 1); a target matches no
        layer (the error names the layers); targets is not a regular expression; the model has
        adapters already.
      TypeError: `model` is not an nnx module.
      NotImplementedError: dropout for a layer of a class that `register_layer` registered, whose
        weight alone is adapted; or `dora` for another layer than a linear one.

    Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314.

    Examples:
      >>> import jax, jax.numpy as jnp, q4jax
      >>> from flax import nnx
      >>> model = q4jax.quantize_model(nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0))))
      >>> model = q4jax.add_lora(model, rank=8, alpha=16)
      >>> adapters = nnx.DiffState(0, nnx.LoRAParam)
      >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 64))).sum(), argnums=adapters)(model)
      >>> [leaf.shape for leaf in jax.tree.leaves(grads)]
      [(64, 8), (8, 32)]
    """
    check_adapter(rank, dropout)
    settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "rslora": rslora, "dropout": dropout}
    if dora:
        settings["dora"] = True
    settings |= {"param_dtype": param_dtype, "rngs": nnx.Rngs(0) if rngs is None else rngs}
    check_module(model)
    _require_none(model)
    found = {path: target_of(module) for path, module in iter_modules(model)}
    layers = {path: target for path, target in found.items() if target is not None}
    chosen = choose_targets(
        {p: t.is_4bit and not t.is_embedding for p, t in layers.items()}, targets
    )

    def replace(path: str, module: nnx.Module) -> nnx.Module:
        return layers[path].adapt(module, path, settings) if path in chosen else module

    return replace_modules(model, replace)


def _require_none(model: Any) -> None:
    for path, module in iter_modules(model):
        if isinstance(module, Adapter):
            raise ValueError(f"model has an adapter already at {path or '(root)'}")
