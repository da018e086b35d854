"""A quantization state as bitsandbytes' dict: its key names, its JSON and their checks."""

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
from jax import Array

from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec

_MAX_FLOAT32 = np.finfo(np.float32).max
_STATE_KEY = "quant_state.bitsandbytes__"
_SCALARS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_SCALARS = ("nested_blocksize", "nested_dtype", "nested_offset")
_ARRAYS = ("absmax", "quant_map")
_NESTED_ARRAYS = ("nested_absmax", "nested_quant_map")
# bitsandbytes writes the table of the codes in torch's default dtype, and decodes without it.
_TABLE_DTYPES = ("float32", "bfloat16", "float16", "float64")
_NESTED_TABLE_DTYPES = ("float32", "float64")
_TABLE_ULPS = 4


def write(
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    spec: QuantSpec,
    shape: tuple[int, ...],
    packed: bool,
) -> dict[str, Any]:
    """Return the dict of one state; if `packed`, with its scalars as JSON in one array."""
    arrays = {
        "absmax": np.asarray(absmax).reshape(-1),
        "quant_map": np.array(codebooks.CODEBOOKS[spec.quant_type].values),
    }
    scalars: dict[str, Any] = {
        "quant_type": spec.quant_type,
        "blocksize": spec.blocksize,
        "dtype": spec.dtype.name,
        "shape": list(shape),
    }
    if nested_absmax is not None and offset is not None:
        arrays["nested_absmax"] = np.asarray(nested_absmax)
        arrays["nested_quant_map"] = np.array(codebooks.DYNAMIC_MAP)
        scalars["nested_blocksize"] = spec.nested_blocksize
        scalars["nested_dtype"] = "float32"
        scalars["nested_offset"] = float(offset)
    if not packed:
        return arrays | scalars
    text = json.dumps(scalars).encode()
    return arrays | {_STATE_KEY + spec.quant_type: np.frombuffer(text, np.uint8).copy()}


def read(d: dict[str, Any]) -> tuple[Any, Any, Any, QuantSpec]:
    """Read absmax, nested_absmax, offset and spec from a dict; ValueError names a wrong entry.

    The first three are NumPy arrays, which may share memory with those of the dict, or None.
    """
    items = _unpacked(d)
    plain, nested = {*_SCALARS, *_ARRAYS}, {*_NESTED_SCALARS, *_NESTED_ARRAYS}
    unknown = sorted(items.keys() - plain - nested)
    if unknown:
        raise ValueError(f"unknown keys in a quant state: {unknown}")
    is_nested = bool(items.keys() & nested)
    missing = sorted((plain | nested if is_nested else plain) - items.keys())
    if missing:
        raise ValueError(f"missing keys in a quant state: {missing}")

    quant_type = items["quant_type"]
    blocksize = _integer("blocksize", items["blocksize"])
    shape = tuple(_integer("shape", n) for n in _sequence("shape", items["shape"]))
    spec = QuantSpec.from_shape(shape, str(items["dtype"]), quant_type, blocksize, is_nested)
    table = codebooks.CODEBOOKS[quant_type].values
    _check_table("quant_map", items["quant_map"], table, _TABLE_DTYPES)
    codes = as_numpy("absmax", items["absmax"])
    lead = shape[: len(shape) - len(spec.shape)]
    blocks = math.prod(lead) * math.prod(spec.absmax_shape)
    _check_flat("absmax", codes, np.uint8 if is_nested else np.float32, blocks, spec)
    absmax = codes.reshape(*lead, *spec.absmax_shape)
    if not is_nested:
        return absmax, None, None, spec

    nested_blocksize = _integer("nested_blocksize", items["nested_blocksize"])
    if nested_blocksize != codebooks.NESTED_BLOCKSIZE:
        raise ValueError(
            f"nested_blocksize must be {codebooks.NESTED_BLOCKSIZE}, got {nested_blocksize}"
        )
    if items["nested_dtype"] != "float32":
        raise ValueError(f"nested_dtype must be 'float32', got {items['nested_dtype']!r}")
    # bitsandbytes decodes scales by the file's table: one of 16 bits gives other scales.
    nested_table = items["nested_quant_map"]
    _check_table("nested_quant_map", nested_table, codebooks.DYNAMIC_MAP, _NESTED_TABLE_DTYPES)
    nested_absmax = as_numpy("nested_absmax", items["nested_absmax"])
    nested_blocks = -(-blocks // codebooks.NESTED_BLOCKSIZE)
    _check_flat("nested_absmax", nested_absmax, np.float32, nested_blocks, spec)
    offset = _float("nested_offset", items["nested_offset"])
    return absmax, nested_absmax.reshape(-1), np.asarray(offset, np.float32), spec


def _unpacked(d: dict[str, Any]) -> dict[str, Any]:
    """Strip the keys' prefix and merge the JSON; ValueError where two keys become one."""
    items: dict[str, Any] = {}
    for key in d:
        if not isinstance(key, str):
            raise ValueError(f"keys of a quant state must be str, got {key!r}")

    def put(name: str, value: Any) -> None:
        if name in items:
            raise ValueError(f"{name} is given twice in a quant state: {sorted(d)}")
        items[name] = value

    packed = [k for k in d if k.rpartition(".")[2].startswith("bitsandbytes__")]
    if len(packed) > 1 or (not packed and not any(k.endswith("quant_type") for k in d)):
        raise ValueError(f"exactly one `quant_state` item expected, found {packed} in {sorted(d)}")
    for key in packed:
        scalars = _json(key, d[key])
        if scalars.get("quant_type") != key.rpartition("__")[2]:
            raise ValueError(f"{key} holds quant_type {scalars.get('quant_type')!r}")
        for name, value in scalars.items():
            put(name, value)
    for key, value in d.items():
        if key not in packed:
            put(key.rpartition(".")[2], value)
    return items


def _json(key: str, array: Any) -> dict[str, Any]:
    array = as_numpy(key, array)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"{key} must be uint8 [n] of JSON, got {array.dtype}{list(array.shape)}")
    try:
        scalars = json.loads(array.tobytes().decode())
    except (ValueError, RecursionError) as error:  # also of a number with too many digits
        raise ValueError(f"{key} does not hold JSON: {error}") from None
    if not isinstance(scalars, dict):
        raise ValueError(f"{key} must hold a JSON object, got {type(scalars).__name__}")
    return scalars


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _sequence(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of integers, got {value!r}")
    return list(value)


def _float(name: str, value: Any) -> float:
    array = as_numpy(name, value)
    # A NaN fails the comparison too.
    finite = array.dtype.kind in "fiu" and not array.ndim and abs(array) <= _MAX_FLOAT32
    if not finite:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(array)


def _check_flat(name: str, array: np.ndarray, dtype: Any, size: int, spec: QuantSpec) -> None:
    if array.dtype != dtype or array.size != size:
        raise ValueError(
            f"{name} must be {np.dtype(dtype).name} of {size} elements for {spec.tag()}, "
            f"got {array.dtype} of {array.size}"
        )


def _check_table(name: str, value: Any, standard: np.ndarray, dtypes: tuple[str, ...]) -> None:
    """Raise ValueError unless a table is the standard one, rounded to one of these dtypes."""
    table = as_numpy(name, value)
    if table.dtype.name not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(dtypes)}, got {table.dtype}")
    ulp = float(ml_dtypes.finfo(table.dtype).eps) * np.abs(standard.astype(np.float64))
    wrong = table.shape != standard.shape or not np.all(
        np.abs(table.astype(np.float64) - standard) <= _TABLE_ULPS * ulp
    )
    if wrong:
        raise ValueError(f"{name} is not the standard table of {list(standard.shape)} values")


def as_numpy(name: str, value: Any) -> np.ndarray:
    """Return an array of numbers; ValueError names it where NumPy cannot hold it as it is."""
    try:
        array = np.asarray(value)
    # What numpy() of other packages raises: for a dtype, a device, a tensor that requires grad.
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be read as a NumPy array: {reason}") from None
    if array.dtype.hasobject:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}")
    return array
