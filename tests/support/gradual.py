"""A traced function run with subnormal numbers, as a GPU runs it; XLA's CPU backend has none.

Float32 arithmetic and comparisons are numpy's, which underflow gradually. Whatever only moves
numbers, and what computes with integers, is run by jax.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FLOATS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "gt": np.greater,
    "le": np.less_equal,
    "le_to": lambda a, b: (a <= b) | np.isnan(b),  # NaN is the largest in a total order
}
_MOVES = {
    *("bitcast_convert_type", "broadcast_in_dim", "convert_element_type", "gather", "pad"),
    *("reshape", "scatter", "select_n", "slice", "squeeze"),
}


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Return the function's result; KeyError for an operation on floats that is not known here."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    with np.errstate(all="ignore"):
        found = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        operands = [atom.val if hasattr(atom, "val") else values[atom] for atom in equation.invars]
        values |= zip(equation.outvars, _run(equation, operands), strict=True)
    return [atom.val if hasattr(atom, "val") else values[atom] for atom in jaxpr.outvars]


def _run(equation: Any, operands: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "jit":
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, operands)
    if name == "scan":
        return _scan(params, operands)
    if type(params.get("_prim")).__name__ == "SearchSorted":  # jax 0.12 has a loop no more
        sorted_values, queries = map(np.asarray, operands)
        assert sorted_values.ndim == 1
        return [np.searchsorted(sorted_values, queries, params["_prim"].side).astype(np.int32)]
    floats = any(jnp.issubdtype(np.asarray(o).dtype, jnp.floating) for o in operands)
    if floats and name not in _MOVES:
        return [_FLOATS[name](*map(np.asarray, operands))]
    found = equation.primitive.bind(*operands, **params)
    return [*found] if equation.primitive.multiple_results else [found]


def _scan(params: dict[str, Any], operands: list[Any]) -> list[Any]:
    """A loop with a carry only."""
    constants, carry = operands[: params["num_consts"]], operands[params["num_consts"] :]
    assert len(carry) == params["num_carry"], "a scan over arrays"
    for _ in range(params["length"]):
        carry = _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*constants, *carry])
    return carry
