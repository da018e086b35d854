"""Bitsandbytes' files a second time: the plainest numpy reader, which checks nothing."""

import json

import ml_dtypes
import numpy as np

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
MARK = ".quant_state.bitsandbytes__"


def read_tensors(data):
    """Name to array, of the bytes of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + start : 8 + length + stop], np.uint8)
        tensors[name] = raw.copy().view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read(data):
    """Name to a list of plain values: what a loaded tree must hold, array by array."""
    tensors = read_tensors(data)
    names = {key.partition(MARK)[0]: key for key in tensors if MARK in key}
    found = {}
    for name, key in names.items():
        info = json.loads(tensors.pop(key).tobytes())
        arrays = [tensors.pop(name), tensors.pop(f"{name}.absmax")]
        tensors.pop(f"{name}.quant_map")
        if f"{name}.nested_absmax" in tensors:
            arrays.append(tensors.pop(f"{name}.nested_absmax"))
            arrays.append(np.float32(info["nested_offset"]))
            tensors.pop(f"{name}.nested_quant_map")
        described = [info["quant_type"], info["blocksize"], info["dtype"], list(info["shape"])]
        found[name] = described + [array.tobytes() for array in arrays]
    for name, array in tensors.items():
        found[name] = [array.dtype.name, list(array.shape), array.tobytes()]
    return found


def describe(tree):
    """The same of a tree that q4jax loaded."""
    found = {}
    for name, leaf in tree.items():
        state = getattr(leaf, "quant_state", None)
        if state is None:
            found[name] = [leaf.dtype.name, list(leaf.shape), np.asarray(leaf).tobytes()]
            continue
        arrays = [leaf.packed, state.absmax]
        if state.nested:
            arrays += [state.nested_absmax, state.offset]
        described = [state.quant_type, state.blocksize, state.dtype.name, list(state.shape)]
        found[name] = described + [np.asarray(array).tobytes() for array in arrays]
    return found
