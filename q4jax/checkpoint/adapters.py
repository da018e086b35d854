"""Checkpoints of adapters alone, with the fingerprint of the base that they belong to."""

import json
from typing import Any, TypeVar

from flax import nnx

from q4jax.lora.adapter import Adapter
from q4jax.nnx.traverse import iter_modules
from q4jax.tree.fingerprint import fingerprint, has_fingerprint

M = TypeVar("M", bound=nnx.Module)


def adapter_state(model: nnx.Module, *, base: str | None = None) -> dict[str, Any]:
    """Return a tree of a model's adapters and the fingerprint of their base, to be saved.

    Save the base once (`checkpoint.save(path, model_without_adapters)`) and this as often as
    wanted: it is a few MB where the base has GB.

    Args:
      model: with adapters.
      base: the fingerprint of the model, where it is known already; None: it is computed.

    Returns:
      {"adapters": the state of `nnx.LoRAParam`, "base": the fingerprint, "settings": JSON}.

    Raises:
      ValueError: the model has no adapter.

    Examples:
      >>> import tempfile, q4jax
      >>> from flax import nnx
      >>> from q4jax import checkpoint
      >>> base = q4jax.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
      >>> model = q4jax.add_lora(base, rank=8, alpha=16)
      >>> path = tempfile.mkdtemp() + "/adapters"
      >>> checkpoint.save(path, checkpoint.adapter_state(model))
      >>> fresh = q4jax.add_lora(base, rank=8, alpha=16)
      >>> tree = checkpoint.restore(path, checkpoint.adapter_state(fresh))
      >>> type(checkpoint.with_adapters(fresh, tree)).__name__
      'LoRALinear4bit'
    """
    settings = {
        path: [module.rank, module.alpha, module.rslora, *([module.parts] if module.parts else [])]
        for path, module in iter_modules(model)
        if isinstance(module, Adapter)
    }
    if not settings:
        raise ValueError("the model has no adapter; add_lora makes them")
    return {
        "adapters": nnx.state(model, nnx.LoRAParam),
        "base": fingerprint(model) if base is None else base,
        "settings": json.dumps(settings, sort_keys=True),
    }


def with_adapters(model: M, tree: dict[str, Any]) -> M:
    """Return a model with the adapters of a tree, which shares all other arrays.

    Args:
      model: with adapters of the same shapes; it is left as it was.
      tree: what `adapter_state` returned, restored with the model's own as the target.

    Raises:
      ValueError: the tree belongs to a base with other 4-bit weights, or to adapters with other
        settings; both are named.
    """
    base = fingerprint(model)
    mine = adapter_state(model, base=base)
    # 0.1 saved a fingerprint of another scheme.
    if tree["base"] != base and has_fingerprint(model, tree["base"]):
        mine["base"] = tree["base"]
    for key in ("base", "settings"):
        if tree[key] != mine[key]:
            raise ValueError(f"the adapters belong to {key} {tree[key]}, the model has {mine[key]}")
    new = nnx.clone(model)
    nnx.update(new, tree["adapters"])
    return new
