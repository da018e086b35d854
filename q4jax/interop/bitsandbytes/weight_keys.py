"""bitsandbytes' state dicts: which tensors are one 4-bit weight, and that weight from them."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from q4jax.core.codebooks import check_quant_type
from q4jax.core.spec import FLOAT_DTYPES, QuantSpec
from q4jax.core.state import QuantState
from q4jax.interop.placement import Placement, place
from q4jax.interop.safetensors.reader import Entry, parse_json
from q4jax.interop.safetensors.writer import Layout
from q4jax.ops.params import Params4bit, as_params4bit

_ARRAYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE = re.compile(r"(?s)(?:(.*)\.)?(quant_state\.bitsandbytes__(.*))")
# No weight without a quant_state has one of these; a tensor of another kind may be named "absmax".
_ORPHANS = tuple(f".{name}" for name in _ARRAYS if name != "absmax")
# The JSON of a weight of six axes takes 250 bytes.
_MAX_JSON, _MAX_AXES = 4096, 8
_LARGEST = 2**48

CONTAINERS: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype(np.uint8),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
"""quant_storage -> the dtype that files hold codes in."""
_READABLE = (*CONTAINERS.values(), np.dtype(np.int8), np.dtype(np.float64))


class Group(NamedTuple):
    """The tensors of one 4-bit weight: its name is that of the codes.

    statistics: key in the state dict by its name in a `QuantState`'s dict.
    """

    name: str
    statistics: dict[str, str]


class Contents(NamedTuple):
    """What the names of a state dict say: 4-bit weights, other tensors, and what is neither."""

    weights: dict[str, Group]
    others: list[str]
    extra: list[str]


def sort_names(layouts: Mapping[str, Layout | Entry]) -> Contents:
    """Which tensors belong together.

    Raises:
      ValueError: a weight has lost its codes, its statistics, or a part of these.
      NotImplementedError: the tensors of LLM.int8, GPTQ or AWQ are among them.
    """
    _refuse_other_methods(layouts)
    groups: dict[str, Group] = {}
    for key in layouts:
        match = _STATE.fullmatch(key)
        if match is None:
            continue
        name, state, quant_type = match.groups()
        if not name:
            raise ValueError(f"{key!r} has no weight before it")
        check_quant_type(quant_type, f"{key}: quant_type")
        if name in groups:
            raise ValueError(f"exactly one quant_state item expected for {name}, got two: {key}")
        groups[name] = Group(name, {state: key})
    taken = set()
    for group in groups.values():
        group.statistics.update(
            {part: key for part in _ARRAYS if (key := f"{group.name}.{part}") in layouts}
        )
        if group.name not in layouts:
            raise ValueError(f"{group.name} has statistics but no codes")
        taken |= {group.name, *group.statistics.values()}
    rest = [key for key in layouts if key not in taken]
    for key in rest:
        _refuse_statistics(key, layouts)
    for key in rest:
        _refuse_codes(key, layouts[key])
    extra = {key for key in rest if any(prefix in groups for prefix in _prefixes(key))}
    return Contents(groups, [key for key in rest if key not in extra], sorted(extra))


def _prefixes(key: str) -> Iterable[str]:
    """The names that a key is below of: `a` and `a.b` for `a.b.c`."""
    return (key[: match.start()] for match in re.finditer(r"\.", key))


def _refuse_statistics(key: str, layouts: Mapping[str, Layout | Entry]) -> None:
    """ValueError where a tensor is a part of a 4-bit weight that has no quant_state."""
    name, _, part = key.rpartition(".")
    if key.endswith(_ORPHANS) or (part == "absmax" and name in layouts):
        raise ValueError(f"{key} belongs to a 4-bit weight {name} that has no quant_state")


def _refuse_codes(key: str, layout: Layout | Entry) -> None:
    """ValueError where a tensor has the form of codes and the name of a weight."""
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


def read_weight(
    group: Group, tensors: Mapping[str, np.ndarray], placement: Placement | None = None
) -> Params4bit:
    """One 4-bit weight; its name is in every error.

    Raises:
      ValueError: a statistic is missing, or not what bitsandbytes writes; a table is not the
        standard one; codes and statistics do not fit.
    """
    name, state = group.name, read_state(group, tensors)
    data = tensors[name]
    check_codes(name, Layout.of(data), state)
    codes = data.reshape(-1).view(np.uint8).reshape(*state.lead, *state.spec.packed_shape)
    return Params4bit(
        place(f"{name}.packed", codes, placement),
        QuantState(
            place(f"{name}.absmax", state.absmax, placement),
            _place(f"{name}.nested_absmax", state.nested_absmax, placement),
            _place(f"{name}.offset", state.offset, placement),
            state.spec,
        ),
    )


def read_state(group: Group, tensors: Mapping[str, np.ndarray]) -> QuantState:
    """The statistics of one weight; errors as `read_weight`."""
    try:
        statistics = {part: tensors[key] for part, key in group.statistics.items()}
        _check_json(statistics)
        _check_vectors(statistics)
        return QuantState.from_dict(statistics)
    except ValueError as error:
        raise ValueError(f"{group.name}: {error}") from None


def check_codes(name: str, layout: Layout | Entry, state: QuantState) -> None:
    """ValueError unless codes are in a container `[n, 1]` of as many bytes as the state asks."""
    if layout.dtype not in _READABLE or len(layout.shape) != 2 or layout.shape[1] != 1:
        raise ValueError(
            f"{name}: codes must be [n, 1] of {', '.join(d.name for d in _READABLE)}, got "
            f"{layout.dtype}{list(layout.shape)}"
        )
    expected = math.prod((*state.lead, *state.spec.packed_shape))
    if layout.nbytes != expected:
        raise ValueError(
            f"{name}: codes must be {expected} bytes for {state.spec.tag()}, got {layout.nbytes}"
        )


def read_spec(group: Group, tensors: Mapping[str, np.ndarray]) -> tuple[QuantSpec, tuple[int, ...]]:
    """The spec and the leading axes of a weight, from its JSON alone.

    Raises:
      ValueError: as `read_weight`.
    """
    try:
        key = next(key for part, key in group.statistics.items() if part.startswith("quant_state"))
        scalars = _check_json({"quant_state": tensors[key]})
        shape, nested = tuple(scalars["shape"]), "nested_absmax" in group.statistics
        quant_type, dtype = scalars.get("quant_type", ""), scalars.get("dtype", "")
        spec = QuantSpec.from_shape(shape, dtype, quant_type, scalars.get("blocksize", 0), nested)
        return spec, shape[: len(shape) - len(spec.shape)]
    except ValueError as error:
        raise ValueError(f"{group.name}: {error}") from None


def _check_json(statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The JSON, with a shape that can be computed with; ValueError otherwise."""
    part = next(part for part in statistics if part.startswith("quant_state"))
    array = statistics[part]
    if array.dtype != np.uint8 or array.ndim != 1 or array.size > _MAX_JSON:
        raise ValueError(
            f"{part} must be uint8 [n] of at most {_MAX_JSON} bytes of JSON, got "
            f"{array.dtype}{list(array.shape)}"
        )
    scalars = parse_json(array.tobytes(), part)
    shape = scalars.get("shape")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES:
        raise ValueError(f"shape must be a list of up to {_MAX_AXES} integers, got {shape!r}")
    if not all(type(n) is int and 0 < n <= _LARGEST for n in shape):
        raise ValueError(f"shape must hold positive integers, got {shape!r}")
    for key in ("quant_type", "dtype"):
        if not isinstance(scalars.get(key, ""), str):
            raise ValueError(f"{key} must be a text, got {scalars[key]!r}")
    if scalars.get("dtype") not in (*(dtype.name for dtype in FLOAT_DTYPES), None):
        # Before numpy, which knows float32 by other names too.
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {scalars['dtype']}")
    return scalars


def _check_vectors(statistics: Mapping[str, np.ndarray]) -> None:
    absmax = statistics.get("absmax")
    if absmax is not None and absmax.dtype == ml_dtypes.bfloat16:
        raise ValueError(
            "absmax is bfloat16: bitsandbytes repacked this weight for its CPU, which cannot be "
            "undone; save the model before it is used in eval mode"
        )
    for part in _ARRAYS:
        array = statistics.get(part)
        if array is not None and array.ndim != 1:
            raise ValueError(f"{part} must have one axis, got {array.dtype}{list(array.shape)}")


def _place(name: str, array: Any, placement: Placement | None) -> Any:
    return None if array is None else place(name, array, placement)


def write_weight(name: str, weight: Params4bit, quant_storage: str) -> dict[str, np.ndarray]:
    """The tensors of one weight.

    Raises:
      ValueError: the weight is stacked and nested; its bytes do not fill the container.
    """
    container = CONTAINERS[quant_storage]
    try:
        tensors = as_params4bit(weight).state_dict(name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    codes = np.ascontiguousarray(tensors[name]).reshape(-1)
    if codes.size % container.itemsize:
        raise ValueError(
            f"{name}: {codes.size} bytes of codes do not fill quant_storage={quant_storage!r} of "
            f"{container.itemsize} bytes each; use 'uint8'"
        )
    return tensors | {name: codes.view(container).reshape(-1, 1)}
