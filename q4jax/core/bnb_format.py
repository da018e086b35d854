"""A quantization state as bitsandbytes' dict: its key names, its JSON and their checks."""

import json
import math
from typing import Any

import jax
import numpy as np
from jax import Array

from q4jax.core import codebooks
from q4jax.core.spec import QuantSpec

_STATE_KEY = "quant_state.bitsandbytes__"
_SCALARS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_SCALARS = ("nested_blocksize", "nested_dtype", "nested_offset")
_ARRAYS = ("absmax", "quant_map")
_NESTED_ARRAYS = ("nested_absmax", "nested_quant_map")


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


def read(d: dict[str, Any]) -> tuple[Array, Array | None, Array | None, QuantSpec]:
    """Read absmax, nested_absmax, offset and spec from a dict; ValueError names a wrong entry."""
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
    _check_table("quant_map", items["quant_map"], codebooks.CODEBOOKS[quant_type].values)
    codes = np.asarray(items["absmax"])
    lead = shape[: len(shape) - len(spec.shape)]
    blocks = math.prod(lead) * math.prod(spec.absmax_shape)
    _check_flat("absmax", codes, np.uint8 if is_nested else np.float32, blocks, spec)
    absmax = _on_device(codes.reshape(*lead, *spec.absmax_shape))
    if not is_nested:
        return absmax, None, None, spec

    nested_blocksize = _integer("nested_blocksize", items["nested_blocksize"])
    if nested_blocksize != codebooks.NESTED_BLOCKSIZE:
        raise ValueError(
            f"nested_blocksize must be {codebooks.NESTED_BLOCKSIZE}, got {nested_blocksize}"
        )
    if items["nested_dtype"] != "float32":
        raise ValueError(f"nested_dtype must be 'float32', got {items['nested_dtype']!r}")
    _check_table("nested_quant_map", items["nested_quant_map"], codebooks.DYNAMIC_MAP)
    nested_absmax = np.asarray(items["nested_absmax"])
    nested_blocks = -(-blocks // codebooks.NESTED_BLOCKSIZE)
    _check_flat("nested_absmax", nested_absmax, np.float32, nested_blocks, spec)
    offset = _float("nested_offset", items["nested_offset"])
    return absmax, _on_device(nested_absmax.reshape(-1)), _on_device(np.float32(offset)), spec


def _on_device(array: Any) -> Array:
    """Copy to a JAX array; `jnp.asarray` would compile a program for each new shape."""
    return jax.device_put(np.array(array))


def _unpacked(d: dict[str, Any]) -> dict[str, Any]:
    """Strip the keys' prefix and merge the JSON; ValueError where two keys become one."""
    items: dict[str, Any] = {}

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
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"{key} must be uint8 [n] of JSON, got {array.dtype}{list(array.shape)}")
    try:
        scalars = json.loads(array.tobytes().decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "fiu" or not np.isfinite(array):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(array)


def _check_flat(name: str, array: np.ndarray, dtype: Any, size: int, spec: QuantSpec) -> None:
    if array.dtype != dtype or array.size != size:
        raise ValueError(
            f"{name} must be {np.dtype(dtype).name} of {size} elements for {spec.tag()}, "
            f"got {array.dtype} of {array.size}"
        )


def _check_table(name: str, value: Any, standard: np.ndarray) -> None:
    table = np.asarray(value)
    if table.dtype != np.float32 or not np.array_equal(table, standard):
        raise ValueError(f"{name} is not the standard table of float32{list(standard.shape)}")
