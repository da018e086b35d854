"""One step of training, and the loss of held-out rows."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from q4jax.finetune.cross_entropy import loss
from q4jax.finetune.packing import Rows
from q4jax.finetune.placement import Placement
from q4jax.models.decoder.decoder import Llama


class Measured(NamedTuple):
    """What a step found before its update, float32 scalars.

    Attributes:
      loss: the mean over the tokens that are learned, in nats.
      grad_norm: the norm of its gradient, before clipping.
    """

    loss: jax.Array
    grad_norm: jax.Array


def train_step(
    model: Llama,
    optimizer: "nnx.Optimizer[Any]",
    batch: Mapping[str, jax.Array],
    placement: Placement,
) -> Measured:
    """Update the adapters once, by the gradient of the mean loss of all tokens that are learned.

    Args:
      model: the model with adapters; it is changed.
      optimizer: that of `make_optimizer`; it is changed.
      batch: what `loss` takes, as `[parts, rows, length]`. Parts are computed one after the other,
        so that the activations of one are in memory.
      placement: that of the model.
    """
    adapters, streams, state, found = _step(*_arguments(model, optimizer, batch, placement))
    for part in (adapters, streams):
        nnx.update(model, part)
    nnx.update(optimizer, state)
    return found


def compile_step(
    model: Llama, optimizer: "nnx.Optimizer[Any]", batch: Mapping[str, Any], placement: Placement
) -> Any:
    """Return the program of `train_step` for these arguments, which may be abstract."""
    return _step.lower(*_arguments(model, optimizer, batch, placement)).compile()


def _arguments(
    model: Llama, optimizer: "nnx.Optimizer[Any]", batch: Mapping[str, Any], placement: Placement
) -> tuple[Any, ...]:
    split: Any = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)
    graphdef, *states = split
    return (
        graphdef,
        nnx.graphdef(optimizer),
        placement,
        *states,
        nnx.state(optimizer),
        dict(batch),
    )


# The frozen weights go in and do not come out, or the program would copy them.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    graphdef: Any,
    optimizer_def: Any,
    placement: Placement,
    adapters: Any,
    streams: Any,
    frozen: Any,
    optimizer_state: Any,
    batch: Mapping[str, jax.Array],
) -> tuple[Any, Any, Any, Measured]:
    def of_part(adapters: Any, streams: Any, part: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, adapters, streams, frozen, copy=True)
        value = loss(model, **part)
        return value, nnx.state(model, nnx.RngState)  # dropout has moved its streams on

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        total, grads, streams = carry
        gradient = jax.value_and_grad(of_part, has_aux=True)
        (value, streams), new = gradient(adapters, streams, part)
        return (total + value, jax.tree.map(jnp.add, grads, new), streams), None

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, adapters), streams)
    (total, grads, streams), _ = jax.lax.scan(add, start, dict(batch))
    count = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    grads = jax.tree.map(lambda grad: grad / count.astype(grad.dtype), grads)
    model = nnx.merge(graphdef, adapters, streams, frozen)
    optimizer: Any = nnx.merge(optimizer_def, optimizer_state)
    optimizer.update(model, grads)
    placement.place(model, nnx.LoRAParam)  # fixed shardings, or the next step compiles again
    placement.place(optimizer)
    new, found = nnx.state(model, nnx.LoRAParam), Measured(total / count, optax.tree.norm(grads))
    return new, streams, nnx.state(optimizer), found


@nnx.jit
def _loss(model: Llama, batch: Mapping[str, jax.Array]) -> jax.Array:
    return loss(model, **batch)


def evaluate(
    model: Llama, rows: Rows, *, batch: int = 4, placement: Placement | None = None
) -> float:
    """Return the mean loss in nats of the tokens of rows that are learned.

    Args:
      model: the model; dropout is off meanwhile.
      rows: packed documents.
      batch: how many of them are computed at once; the last ones are filled up by rows without
        tokens to learn, so that one program is compiled.
      placement: that of the model; None: the default device.
    """
    placement = Placement(None) if placement is None else placement
    view, total = without_dropout(model), 0.0
    for start in range(0, len(rows), batch):
        part = rows.take(slice(start, start + batch))
        missing = batch - len(part["inputs"])
        filled = {n: np.pad(a, ((0, missing), (0, 0))) for n, a in part.items()}
        total += float(_loss(view, placement.batch(filled)))
    return total / max(rows.learned, 1)


def without_dropout(model: Llama) -> Llama:
    """Return another graph of a model's variables, in which dropout is off."""
    view: Llama = nnx.merge(*nnx.split(model))
    view.eval()
    return view
