"""What the backward pass of a layer computes again, by name."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# Names of what is kept, beside the input of each layer.
_KEPT = {"layer": (), "attention": ("attention",), "projections": ("attention", "projection")}
REMAT = (None, *_KEPT)


def policy_of(remat: str | bool | None) -> Any:
    """Return the policy of `jax.checkpoint` for a setting of `Llama`; None: keep everything.

    Raises:
      ValueError: the setting is unknown.
    """
    name = ("layer" if remat else None) if isinstance(remat, bool) else remat
    if name not in REMAT:
        raise ValueError(f"remat must be a bool or one of {REMAT}, got {remat!r}")
    return None if name is None else jax.checkpoint_policies.save_only_these_names(*_KEPT[name])


def projection(y: jax.Array) -> jax.Array:
    """Mark the result of a projection, which `remat="projections"` keeps."""
    named: jax.Array = checkpoint_name(y, "projection")
    return named


def attended(y: jax.Array) -> jax.Array:
    """Mark a result of attention, which `remat="attention"` keeps."""
    named: jax.Array = checkpoint_name(y, "attention")
    return named
