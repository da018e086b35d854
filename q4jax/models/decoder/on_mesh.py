"""Run a model on Explicit mesh axes: in a region whose axes are the compiler's.

There 4-bit weights keep in their descriptions where they lie, since the types of arrays no longer
tell; their operations become `shard_map`s by that. The compiler partitions all else, as on Auto
axes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from q4jax.core.placed_spec import PlacedSpec
from q4jax.core.state import QuantState
from q4jax.nnx.quantized_variable import QuantizedVariable
from q4jax.nnx.variables import from_variables
from q4jax.ops.params import Params4bit
from q4jax.sharding.axes import MeshAxes, mesh_axes_of
from q4jax.sharding.residual import split_batches

F = TypeVar("F", bound=Callable[..., Any])
Places = dict[Any, tuple[MeshAxes, ...]]
"""Place of a weight in a model -> the mesh axes of each axis of the codes."""


def leaves_axes_to_compiler(specs: Callable[..., Any]) -> Callable[[F], F]:
    """Have a method of a model, whose first array is a batch, run on Explicit axes too.

    Args:
      specs: a function from the model, the mesh axes of the batch and the method's arguments to the
        PartitionSpecs of the results, a tree like that of the results or a prefix of it.
    """

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def on_mesh(self: Any, *args: Any, **kwargs: Any) -> Any:
            return run_for_compiler(self, method, specs, *args, **kwargs)

        return on_mesh  # type: ignore[return-value]

    return decorate


def run_for_compiler(
    model: Any, run: Callable[..., Any], specs: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Return `run(model, *args, **kwargs)`, computed in a region whose mesh axes are Auto.

    Outside of a mesh whose axes are all Explicit, this is a plain call.

    Raises:
      ValueError: the model lies on Explicit axes, and no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_types) != {AxisType.Explicit}:
        if mesh.empty:
            _require_no_mesh(model)
        return run(model, *args, **kwargs)
    leaves, tree = jax.tree.flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    arrays = [leaves[i] for i in where]
    batch = next((_first_axis(array) for array in arrays if array.ndim), ())
    graphdef, state = nnx.split(model)
    places = _places(model)

    def body(state: Any, arrays: list[Any]) -> tuple[Any, Any]:
        own = nnx.merge(graphdef, state)
        _tell(own, places, batch)
        found = list(leaves)
        for i, array in zip(where, arrays, strict=True):
            found[i] = array
        args, kwargs = jax.tree.unflatten(tree, found)
        with split_batches(batch):
            return run(own, *args, **kwargs), nnx.state(own, nnx.RngState)

    wanted = specs(model, batch, *args, **kwargs)
    region = jax.sharding.auto_axes(body, out_sharding=(wanted, PartitionSpec()))
    results, streams = region(state, arrays)
    nnx.update(model, streams)  # dropout has moved its streams on
    return results


def _require_no_mesh(model: Any) -> None:
    arrays = jax.tree.leaves(nnx.state(model.embed_tokens))
    mesh = jax.typeof(arrays[0]).sharding.mesh if arrays else jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"model is on a mesh whose axes {mesh.axis_names} are Explicit: call it, and what "
            "jax.jit traces, under jax.set_mesh(mesh)"
        )


def _first_axis(array: Any) -> MeshAxes:
    """The mesh axes that split the first axis of an array, but for those of size 1."""
    sharding = jax.typeof(array).sharding
    return mesh_axes_of(sharding.spec, array.ndim, sharding.mesh.shape)[0]


def _weights(model: Any) -> Iterator[tuple[Any, Any, str, Params4bit]]:
    """The place of each 4-bit weight in the model, its owner, its name there, and the weight."""
    for path, module in nnx.iter_modules(model):
        for name, value in list(vars(module).items()):
            if isinstance(value, Params4bit):
                yield (path, name), module, name, value
            elif isinstance(value, QuantizedVariable):
                yield (path, name), value, "weight", value.weight


def _places(model: Any) -> Places:
    found = {}
    for key, _, _, weight in _weights(model):
        array = from_variables(weight).packed
        sharding = jax.typeof(array).sharding
        found[key] = mesh_axes_of(sharding.spec, array.ndim, sharding.mesh.shape)
    return found


def _tell(model: Any, places: Places, batch: MeshAxes) -> None:
    """Write into the descriptions of 4-bit weights where they lie."""
    for key, owner, name, weight in _weights(model):
        state = weight.quant_state
        spec = PlacedSpec.of(state.spec, places[key], batch)
        state = QuantState(state.absmax, state.nested_absmax, state.offset, spec)
        setattr(owner, name, Params4bit(weight.packed, state))
