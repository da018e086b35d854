"""The optimizer of adapters: AdamW with a schedule, clipping, and LoRA+."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from flax import nnx

from q4jax.finetune.settings import Settings

# The settings that the optimizer depends on.
_USED = {"steps", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "loraplus"}


def schedule(settings: Settings) -> optax.Schedule:
    """Return the learning rate by the number of steps done.

    It rises from 0 over `warmup` of the steps, then falls to 0 at the last one, or is constant.
    """
    peak, steps = settings.learning_rate, settings.steps
    warmup = int(settings.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(model: nnx.Module, settings: Settings) -> "nnx.Optimizer[Any]":
    """Return an optimizer of a model's adapters, and of nothing else.

    LoRA+ (arXiv:2402.12354) multiplies the learning rate of the second factors, and of magnitudes.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    others: dict[str, Any] = {n: v for n, v in defaults.items() if n not in _USED and n != "model"}
    transformation = _transformation(dataclasses.replace(settings, model=None, **others))
    return nnx.Optimizer(model, transformation, wrt=nnx.LoRAParam)


@functools.lru_cache(maxsize=8)
def _transformation(settings: Settings) -> optax.GradientTransformation:
    """Return the same object for the same settings, so that a second run compiles nothing anew."""
    steps: list[optax.GradientTransformation] = [
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule(settings), weight_decay=settings.weight_decay),
    ]
    if settings.loraplus != 1.0:
        steps.append(_faster(settings.loraplus))
    return optax.chain(*steps)


def _faster(ratio: float) -> optax.GradientTransformation:
    def scale(path: Any, update: jax.Array) -> jax.Array:
        names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
        return update * ratio if names & {"lora_b", "magnitude"} else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
