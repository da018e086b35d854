"""The leaves of a tree by path, and the 4-bit weights among them."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.core.meta import AxisMetadata
from jax.tree_util import SequenceKey

from q4jax.core.spec import QuantSpec
from q4jax.core.state import QuantState, split_tag, with_tag
from q4jax.nnx.variables import Frozen4bit
from q4jax.ops.params import Params4bit, as_params4bit

# Where a leaf is: keys and attribute names as they are, an index into a list as a SequenceKey.
Path = tuple[str | int | SequenceKey, ...]
Leaves = dict[Path, Any]


def leaves(tree: Any) -> Leaves:
    """Return the leaves of a tree by path; modules, Variables and Linen's boxes are opened.

    Raises:
      ValueError: two leaves have one name; a Variable belongs to a weight of another description.
      TypeError: a key is neither str nor int; the tree is a single array.
    """
    found: Leaves = {}
    tags: dict[Path, str] = {}

    def keep(path: Path, leaf: Any, variable: nnx.Variable[Any] | None) -> Any:
        if not path:
            raise TypeError(f"tree must be a container of arrays, got {describe(leaf)}")
        found[path] = leaf
        if isinstance(variable, Frozen4bit):
            tags[path] = variable.get_metadata("tag", None)
        return leaf

    map_leaves(keep, tree)
    names: dict[str, Path] = {}
    for path in found:
        if names.setdefault(name_of(path), path) is not path:
            raise ValueError(f"two leaves of the tree are named {name_of(path)!r}")
    specs = {path[:-2]: spec.tag() for path in found if (spec := tag_of(path))}
    for path, tag in tags.items():
        expected = specs.get(path[:-1] if path[-1] == "packed" else path[:-2])
        if tag != expected:
            raise ValueError(
                f"{name_of(path)}: the module expects a weight {expected}, its state holds {tag}"
            )
    return found


def map_leaves(
    function: Callable[[Path, Any, nnx.Variable[Any] | None], Any],
    tree: Any,
    prefix: Path = (),
    variable: nnx.Variable[Any] | None = None,
) -> Any:
    """Replace each leaf of a tree by `function(path, leaf, variable)`.

    Modules, Variables and Linen's boxes come back as what they were, new ones with the new leaves;
    `variable` is the Variable that holds the leaf, or None.
    """

    def at(path: Path, node: Any) -> Any:
        if isinstance(node, nnx.Variable):
            return node.replace(map_leaves(function, node.get_value(), path, node))
        if isinstance(node, nnx.Pytree):
            graphdef, state = nnx.split(node)
            return nnx.merge(graphdef, map_leaves(function, state, path, variable))
        if isinstance(node, AxisMetadata):  # its content is under one key, which is no name
            return jax.tree_util.tree_map_with_path(
                lambda keys, content: at((*path, *map(_key, keys[1:])), content), node
            )
        return function(path, node, variable)

    return jax.tree_util.tree_map_with_path(
        lambda keys, node: at((*prefix, *map(_key, keys)), node),
        tree,
        is_leaf=lambda node: isinstance(node, nnx.Variable | nnx.Pytree | AxisMetadata),
    )


def _key(entry: Any) -> str | int | SequenceKey:
    if isinstance(entry, SequenceKey):
        return entry
    key = getattr(entry, "name", None) if not hasattr(entry, "key") else entry.key
    if not isinstance(key, str | int):
        raise TypeError(f"keys of a tree must be str or int, got {key!r}")
    return key


def nest(values: Leaves) -> Any:
    """Nest values by path in dicts and lists; an index of a list that has no leaf is None."""
    if () in values:
        return values[()]
    groups: dict[Any, Leaves] = {}
    for path, value in values.items():
        groups.setdefault(path[0], {})[path[1:]] = value
    children = {key: nest(group) for key, group in groups.items()}
    if not all(isinstance(key, SequenceKey) for key in children):
        return children
    return [children.get(SequenceKey(i)) for i in range(1 + max(key.idx for key in children))]


def describe(leaf: Any) -> str:
    """Describe a leaf as `uint8[128, 64]`, or by its type where it is not an array."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__


def name_of(path: Path) -> str:
    """Return the name of a leaf, such as `layers.0.weight.packed`, the same in every container."""
    return ".".join(str(key.idx if isinstance(key, SequenceKey) else key) for key in path)


def tag_of(path: Path) -> QuantSpec | None:
    """Return the spec in the tag of the last key, or None."""
    try:
        return split_tag(str(path[-1]))[1] if path else None
    except ValueError:
        return None


def find_weights(found: Leaves) -> dict[Path, Params4bit]:
    """Find the 4-bit weights among leaves, each by the path of its `Params4bit`.

    Raises:
      ValueError: a weight is incomplete, or its arrays do not fit its description.
    """
    scales: dict[Path, dict[str, Any]] = {}
    for path, leaf in found.items():
        if tag_of(path) is not None:
            scales.setdefault(path[:-1], {})[str(path[-1])] = leaf
    return {path[:-1]: _weight(found, path, arrays) for path, arrays in scales.items()}


def _weight(found: Leaves, path: Path, arrays: dict[str, Any]) -> Params4bit:
    """Return the weight whose scales, `arrays` by key, are at `path`."""
    spec = split_tag(next(iter(arrays)))[1]
    names = ("absmax", "nested_absmax", "offset") if spec.nested else ("absmax",)
    keys = [with_tag(name, spec) for name in names]
    if set(keys) != set(arrays):
        raise ValueError(f"{name_of(path)} must hold {', '.join(keys)}; got {', '.join(arrays)}")
    packed = found.get((*path[:-1], "packed"))
    if path[-1:] != ("quant_state",) or packed is None:
        raise ValueError(
            f"the scales at {name_of(path) or 'the top'} have no codes beside them: hold the pair "
            f"as one Params4bit(packed, quant_state)"
        )
    for leaf in (packed, *arrays.values()):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(f"{name_of(path[:-1])} must hold arrays, got {describe(leaf)}")
    absmax, nested_absmax, offset = [arrays[key] for key in keys] + [None] * (3 - len(keys))
    try:
        state = QuantState(absmax, nested_absmax, offset, spec)
        return as_params4bit(packed, state)
    except ValueError as error:
        raise ValueError(f"{name_of(path[:-1])}: {error}") from None


def in_weight(path: Path, weights: dict[Path, Params4bit]) -> bool:
    """Return whether a leaf is one of the arrays of these weights."""
    return (path[-1:] == ("packed",) and path[:-1] in weights) or (
        tag_of(path) is not None and path[:-2] in weights
    )
