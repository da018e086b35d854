"""Convert 4-bit weights from and to bitsandbytes' tensors, with strict checks."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax import Array

from q4jax.core import bnb_format
from q4jax.core.spec import FLOAT_DTYPES, QuantSpec
from q4jax.core.state import QuantState
from q4jax.interop.bitsandbytes.weight_keys import STATISTICS, Layout, WeightKeys, group_keys
from q4jax.interop.files import parse_json
from q4jax.interop.placement import Placement, place, place_weight
from q4jax.ops.params import Params4bit, as_params4bit

Tree = dict[str, Params4bit | Array]

# The JSON of a weight of six axes takes 250 bytes.
_MAX_JSON, _MAX_AXES = 4096, 8
_LARGEST = 2**48

CONTAINERS: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype(np.uint8),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
"""quant_storage -> dtype of the codes in files."""
_READABLE = (*CONTAINERS.values(), np.dtype(np.int8), np.dtype(np.float64))


def read_tensors(
    tensors: Mapping[str, np.ndarray],
    layouts: Mapping[str, Layout],
    strict: bool,
    sharding: Placement | None,
) -> Tree:
    """Return all tensors, 4-bit weights as `Params4bit`; raises as `from_state_dict` does."""
    keys = group_keys(layouts)
    report_extra(keys.extra, strict)
    others = set(keys.others)
    found: Tree = {}
    for name in layouts:  # keeps the order of the state dict
        if name in keys.weights:
            found[name] = read_weight(keys.weights[name], tensors, sharding)
        elif name in others:
            found[name] = place(name, tensors[name], sharding)
    return found


def report_extra(extra: list[str], strict: bool, what: str = "keys below 4-bit weights") -> None:
    """Report unknown keys: ValueError if `strict`, else UserWarning."""
    if extra and strict:
        raise ValueError(f"unknown {what}: {extra}")
    if extra:
        warnings.warn(f"left out unknown {what}: {extra}", stacklevel=4)


def read_weight(
    keys: WeightKeys, tensors: Mapping[str, np.ndarray], placement: Placement | None = None
) -> Params4bit:
    """Return one 4-bit weight; errors name it.

    Raises:
      ValueError: a statistic is missing or malformed, a table is not the standard one, or codes and
        statistics do not match.
    """
    name, state = keys.name, read_state(keys, tensors)
    data: Any = tensors[name]
    check_codes(name, data, state)
    codes = data.reshape(-1).view(np.uint8).reshape(*state.lead, *state.spec.packed_shape)
    return place_weight(name, Params4bit(codes, state), placement)


def read_state(keys: WeightKeys, tensors: Mapping[str, np.ndarray]) -> QuantState:
    """Return the statistics of one weight in NumPy arrays; raises as `read_weight` does."""
    try:
        statistics = {part: tensors[key] for part, key in keys.statistics.items()}
        _check_json(statistics)
        _check_vectors(statistics)
        return QuantState(*bnb_format.read(statistics))
    except ValueError as error:
        raise ValueError(f"{keys.name}: {error}") from None


def check_codes(name: str, layout: Layout, state: QuantState) -> None:
    """Raise ValueError unless codes are `[n, 1]` of a known dtype and of the state's size."""
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


def read_spec(
    keys: WeightKeys, tensors: Mapping[str, np.ndarray]
) -> tuple[QuantSpec, tuple[int, ...]]:
    """Return the spec and the leading axes of a weight, reading its JSON only.

    Raises:
      ValueError: the JSON is malformed, or describes no valid weight.
    """
    try:
        key = next(key for part, key in keys.statistics.items() if part.startswith("quant_state"))
        scalars = _check_json({"quant_state": tensors[key]})
        shape, nested = tuple(scalars["shape"]), "nested_absmax" in keys.statistics
        quant_type, dtype = scalars.get("quant_type", ""), scalars.get("dtype", "")
        spec = QuantSpec.from_shape(shape, dtype, quant_type, scalars.get("blocksize", 0), nested)
        return spec, shape[: len(shape) - len(spec.shape)]
    except ValueError as error:
        raise ValueError(f"{keys.name}: {error}") from None


def _check_json(statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the JSON of a weight; ValueError if a value would break later computations."""
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
        # numpy would accept other spellings of the dtypes too.
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {scalars['dtype']}")
    return scalars


def _check_vectors(statistics: Mapping[str, np.ndarray]) -> None:
    absmax = statistics.get("absmax")
    if absmax is not None and absmax.dtype == ml_dtypes.bfloat16:
        raise ValueError(
            "absmax is bfloat16: bitsandbytes repacked this weight for its CPU, which cannot be "
            "undone; save the model before it is used in eval mode"
        )
    for part in STATISTICS:
        array = statistics.get(part)
        if array is not None and array.ndim != 1:
            raise ValueError(f"{part} must have one axis, got {array.dtype}{list(array.shape)}")


def write_weight(name: str, weight: Params4bit, quant_storage: str) -> dict[str, np.ndarray]:
    """Return the tensors of one weight.

    Raises:
      ValueError: the weight is stacked and double-quantized, or the size of its codes is no
        multiple of the container's.
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
