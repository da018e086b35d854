"""What a scan over stacked layers, or experts, runs over.

It cuts their variables out of the stack, but for 4-bit weights whose kernels read them in the
stack: these stay behind, and each layer is given the stack and its place in it.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from q4jax.models.decoder.stacks import Stack
from q4jax.nnx.linear import Linear4bit
from q4jax.ops.params import Params4bit
from q4jax.ops.registry import takes_stacks
from q4jax.ops.weight_of_stack import WeightOfStack

M = TypeVar("M", bound=nnx.Module)
Path = tuple[Any, ...]
Weights = dict[Path, Params4bit | WeightOfStack]
"""The path of a layer in its module -> its weight, which has leading axes that others lack."""


def hold_weights(layers: M) -> tuple[M, Weights]:
    """Take out of stacked layers the weights that their kernels read in the stack.

    Returns:
      The layers, where something was taken out as a copy without it; and what was taken out.
    """
    held: Weights = {
        path: module.weight
        for path, module in nnx.iter_modules(layers)
        if isinstance(module, Linear4bit) and takes_stacks(module.implementation)
    }
    if not held:
        return layers, held
    which = set(map(id, held.values()))
    leaves, tree = jax.tree.flatten(layers, is_leaf=_is_weight)
    rest: M = jax.tree.unflatten(tree, [None if id(leaf) in which else leaf for leaf in leaves])
    return rest, held


def _is_weight(node: Any) -> bool:
    return isinstance(node, Params4bit | WeightOfStack)


def give_weights(layer: nnx.Module, held: Weights, place: jax.Array) -> None:
    """Give one of the layers its weights, which stay in the stack.

    Args:
      layer: one of the layers that `hold_weights` returned.
      held: what it took out.
      place: int32, the layer's place in the stack.
    """
    if not held:
        return
    for path, module in nnx.iter_modules(layer):
        if path in held:
            stack = held[path]
            named = stack if isinstance(stack, WeightOfStack) else WeightOfStack(stack, ())
            module.weight = named.at(place)  # type: ignore[attr-defined]


def scan_layers(run: Any) -> Any:
    """Scan `run(layers, carry, at) -> carry` over the first axis of layers and `at`."""
    return nnx.scan(run, in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry, graph_updates=False)


def by_period(layers: M, stack: Stack) -> M:
    """Return the layers with an axis of periods before that of the layers of a run."""
    if stack.run == 1:
        return layers
    graphdef, state = nnx.split(layers)
    folded = jax.tree.map(lambda a: a.reshape(-1, stack.run, *a.shape[1:]), state)
    merged: M = nnx.merge(graphdef, folded)
    return merged


def places(stack: Stack) -> tuple[jax.Array, jax.Array]:
    """Return the layers' places in the stack and their numbers, int32, by period and run."""
    shape = (-1,) if stack.run == 1 else (-1, stack.run)
    within = jnp.arange(len(stack.numbers), dtype=jnp.int32)
    return within.reshape(shape), jnp.asarray(stack.numbers, jnp.int32).reshape(shape)
