"""Find which keys of a bitsandbytes state dict belong to the same 4-bit weight."""

import bisect
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from q4jax.core.codebooks import check_quant_type
from q4jax.interop.safetensors.reader import Entry

Layout = Entry | np.ndarray  # a tensor in a file or in memory: dtype, shape and nbytes are read

STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = re.compile(r"(?s)(?:(.*)\.)?(quant_state\.bitsandbytes__(.*))")
# Only a 4-bit weight has one of these; "absmax" may be the name of any tensor.
_ORPHANS = tuple(f".{name}" for name in STATISTICS if name != "absmax")


class WeightKeys(NamedTuple):
    """The keys of one 4-bit weight.

    Attributes:
      name: key of the codes, which names the weight.
      statistics: for each key of `QuantState.as_dict`, the key in the state dict.
    """

    name: str
    statistics: dict[str, str]


class GroupedKeys(NamedTuple):
    """The keys of a state dict: 4-bit weights, dense tensors, and unknown keys below a weight."""

    weights: dict[str, WeightKeys]
    others: list[str]
    extra: list[str]


def group_keys(layouts: Mapping[str, Layout]) -> GroupedKeys:
    """Group the keys of a state dict by weight.

    Raises:
      ValueError: the codes, the statistics or one of the statistics of a weight are missing.
      NotImplementedError: there are tensors of LLM.int8, GPTQ or AWQ.
    """
    _refuse_other_methods(layouts)
    weights: dict[str, WeightKeys] = {}
    for key in layouts:
        match = _STATE.fullmatch(key)
        if match is None:
            continue
        name, state, quant_type = match.groups()
        if not name:
            raise ValueError(f"{key!r} has no weight before it")
        check_quant_type(quant_type, f"{key}: quant_type")
        if name in weights:
            raise ValueError(f"exactly one quant_state item expected for {name}, got two: {key}")
        weights[name] = WeightKeys(name, {state: key})
    taken = set()
    for weight in weights.values():
        weight.statistics.update(
            {part: key for part in STATISTICS if (key := f"{weight.name}.{part}") in layouts}
        )
        if weight.name not in layouts:
            raise ValueError(f"{weight.name} has statistics but no codes")
        taken |= {weight.name, *weight.statistics.values()}
    rest = [key for key in layouts if key not in taken]
    for key in rest:
        _refuse_statistics(key, layouts)
    for key in rest:
        _refuse_codes(key, layouts[key])
    extra = _below(rest, weights)
    return GroupedKeys(weights, [key for key in rest if key not in extra], sorted(extra))


def _below(keys: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the keys that go on after one of the names and a dot, in time linear in their size."""
    prefixes: list[str] = []
    for name in sorted(f"{name}." for name in names):
        if not prefixes or not name.startswith(prefixes[-1]):
            prefixes.append(name)
    # No prefix begins another one, so that of a key is the last one that sorts before it.
    found = ((key, bisect.bisect(prefixes, key)) for key in keys)
    return {key for key, at in found if at and key.startswith(prefixes[at - 1])}


def _refuse_statistics(key: str, layouts: Mapping[str, Layout]) -> None:
    """Raise ValueError if a key is a statistic of a 4-bit weight without quant_state."""
    name, _, part = key.rpartition(".")
    if key.endswith(_ORPHANS) or (part == "absmax" and name in layouts):
        raise ValueError(f"{key} belongs to a 4-bit weight {name} that has no quant_state")


def _refuse_codes(key: str, layout: Layout) -> None:
    """Raise ValueError if a tensor is named like a weight and shaped like 4-bit codes."""
    shape, dtype = layout.shape, layout.dtype
    column = len(shape) == 2 and shape[1] == 1
    if key.endswith("weight") and dtype in (np.uint8, np.int8) and column:
        raise ValueError(
            f"{key} is {dtype}{list(shape)}, as 4-bit codes are, but has no statistics"
        )


def _refuse_other_methods(keys: Iterable[str]) -> None:
    for key in keys:
        last = key.rpartition(".")[2]
        if last in ("SCB", "weight_format"):
            raise NotImplementedError(f"{key}: LLM.int8 weights (8-bit) are not supported")
        if last in ("qweight", "qzeros", "g_idx"):
            raise NotImplementedError(f"{key}: GPTQ and AWQ weights are not supported")
