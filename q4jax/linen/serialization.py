"""`flax.serialization` of 4-bit weights, which importing this module registers.

A `Params4bit` becomes
`{"packed": codes, "quant_state": {"absmax__<tag>": ..., ...}}`: the tag in the names is compared
with the target's, so bytes of one weight cannot fill another. A tag, name, dtype or shape that
differs from the target's is a ValueError that names both.

Examples:
  >>> import jax.numpy as jnp, q4jax
  >>> from flax import serialization
  >>> weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="nf4")
  >>> data = serialization.to_bytes({"weight": weight})
  >>> serialization.from_bytes({"weight": weight}, data)
  {'weight': Params4bit(uint8[2, 32], nf4_b64_n0_float32_2x64)}
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import serialization

from q4jax.core.state import QuantState, split_tag
from q4jax.ops.params import Params4bit


def _to_state_dict(node: Params4bit | QuantState) -> dict[str, Any]:
    """Return the children by the names that they have in the pytree."""
    children, _ = node.tree_flatten_with_keys()
    return {key.name: serialization.to_state_dict(child) for key, child in children}


def _params_from_state_dict(target: Params4bit, state: Any) -> Params4bit:
    _require_keys(("packed", "quant_state"), state)
    # The state first: its error says more than that of a shape.
    quant_state = _restore(target.quant_state, state["quant_state"], "quant_state")
    return Params4bit(_restore(target.packed, state["packed"], "packed"), quant_state)


def _state_from_state_dict(target: QuantState, state: Any) -> QuantState:
    children, spec = target.tree_flatten_with_keys()
    for found in _tags(state):
        if found != spec.tag():
            raise ValueError(
                f"{serialization.current_path()}: the target is {spec.tag()}, "
                f"the state dict holds {found}"
            )
    _require_keys([key.name for key, _ in children], state)
    leaves = [_restore(child, state[key.name], key.name) for key, child in children]
    return QuantState.tree_unflatten(spec, leaves)


def _restore(target: Any, state: Any, name: str) -> Any:
    """Restore `state` in the form of `target`, with its dtypes and shapes."""
    restored = serialization.from_state_dict(target, state, name=name)
    pairs = zip(jax.tree.leaves(target), jax.tree.leaves(restored), strict=True)
    for wanted, found in pairs:
        if _signature(wanted) != _signature(found):
            raise ValueError(
                f"{serialization.current_path()}: the target has {name} {_signature(wanted)}, "
                f"the state dict holds {_signature(found)}"
            )
    return restored


def _signature(leaf: Any) -> str:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return type(leaf).__name__
    return f"{leaf.dtype}{list(leaf.shape)}"


def _tags(state: Any) -> list[str]:
    """Return the tags in the names of a state dict."""
    tags = []
    for key in state if isinstance(state, Mapping) else ():
        try:
            tags.append(split_tag(key)[1].tag())
        except ValueError:
            continue  # `_require_keys` names it
    return tags


def _require_keys(expected: Iterable[str], state: Any) -> None:
    where = serialization.current_path()
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: expected a dict of {list(expected)}, got {_signature(state)}")
    missing = [key for key in expected if key not in state]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        raise ValueError(f"{where}: the state dict lacks {missing} and has unknown {unknown}")


serialization.register_serialization_state(Params4bit, _to_state_dict, _params_from_state_dict)
serialization.register_serialization_state(QuantState, _to_state_dict, _state_from_state_dict)
