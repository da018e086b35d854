"""Malformed state dicts: half a weight, wrong statistics and unknown keys are named errors."""

import json
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from q4jax.interop import bitsandbytes as bnb
from q4jax.interop.bitsandbytes.weight_keys import _below
from tests.support.trees import assert_same

STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def change(**changes):
    """Return a function that changes keys of the layer in a state dict; None removes one."""

    def apply(d):
        d = d | {f"layer.{key}": value(d[f"layer.{key}"]) for key, value in changes.items()}
        return {key: value for key, value in d.items() if value is not None}

    return apply


def gone(_):
    return None


def scalars(**values):
    def edit(array):
        fields = json.loads(array.tobytes()) | values
        return np.frombuffer(json.dumps(fields).encode(), np.uint8)

    return lambda d: d | {STATE: edit(d[STATE])}


def text(content):
    return lambda d: d | {STATE: np.frombuffer(content, np.uint8)}


def rename(old, new):
    return lambda d: {new if key == old else key: value for key, value in d.items()}


DEFECTS = {
    "codes": (change(weight=gone), "layer.weight has statistics but no codes"),
    "quant_state": (lambda d: {k: v for k, v in d.items() if k != STATE}, "has no quant_state"),
    "absmax": (change(**{"weight.absmax": gone}), "layer.weight: missing keys .*absmax"),
    "quant_map": (change(**{"weight.quant_map": gone}), "missing keys .*quant_map"),
    "nested_absmax": (change(**{"weight.nested_absmax": gone}), "missing .*nested_absmax"),
    "statistics": (
        lambda d: {"layer.weight": d["layer.weight"]},
        r"layer.weight is uint8\[6144, 1\], as 4-bit codes are, but has no statistics",
    ),
    "table": (change(**{"weight.quant_map": lambda a: a + 1e-6}), "quant_map is not the standard"),
    "reversed": (
        change(**{"weight.quant_map": lambda a: a[::-1]}),
        "quant_map is not the standard",
    ),
    "nested table": (
        change(**{"weight.nested_quant_map": lambda a: a * 2}),
        "nested_quant_map is not the standard table",
    ),
    "fewer codes": (change(weight=lambda a: a[:-1]), "codes must be 6144 bytes .*, got 6143"),
    "flat codes": (change(weight=np.ravel), r"codes must be \[n, 1\] .* got uint8\[6144\]"),
    "container": (change(weight=lambda a: a.astype(np.int32)), r"got int32\[6144, 1\]"),
    "fewer scales": (change(**{"weight.absmax": lambda a: a[:-1]}), "absmax must be .* 192 el"),
    "scales": (change(**{"weight.absmax": lambda a: a.astype("f4")}), "absmax must be uint8"),
    "axes": (change(**{"weight.absmax": lambda a: a[None]}), "absmax must have one axis"),
    "repacked": (
        change(**{"weight.absmax": lambda a: a.reshape(96, 2).T.astype(ml_dtypes.bfloat16)}),
        "bitsandbytes repacked this weight for its CPU",
    ),
    "shape": (scalars(shape=[128, 128]), "absmax must be uint8 of 256 elements"),
    "more axes": (scalars(shape=[1] * 9), "shape must be a list of up to 8 integers"),
    "negative": (scalars(shape=[-96, -128]), "shape must hold positive integers"),
    "huge": (scalars(shape=[2**60, 128]), "shape must hold positive integers"),
    "float": (scalars(shape=[96.0, 128]), "shape must hold positive integers"),
    "blocksize": (scalars(blocksize=32), "absmax must be uint8 of 384 elements"),
    "no blocksize": (scalars(blocksize=True), "blocksize must be an integer, got True"),
    "other type": (scalars(quant_type="fp4"), "holds quant_type 'fp4'"),
    "dtype": (scalars(dtype="float64"), "dtype must be float32, float16 or bfloat16"),
    "offset": (scalars(nested_offset=float("nan")), "nested_offset must be a finite number"),
    "large offset": (
        scalars(nested_offset=1e300),
        "nested_offset must be a finite number, got 1e.300",
    ),
    "negative offset": (scalars(nested_offset=-3.5e38), "nested_offset must be .*, got -3.5e"),
    "unknown": (scalars(extra=1), r"unknown keys in a quant state: \['extra'\]"),
    "no json": (text(b"{"), "is not JSON"),
    "no text": (text(b"\xff{}"), "is not JSON"),
    "no object": (text(b"[]"), "must be a JSON object, got list"),
    "twice": (text(b'{"shape": [1], "shape": [2]}'), "key 'shape' is given twice"),
    "deep": (text(b"[" * 4000), "is not JSON"),
    "long": (text(b" " * 5000), "at most 4096 bytes of JSON"),
    "two types": (
        lambda d: d | {STATE[:-3] + "fp4": d[STATE]},
        "exactly one quant_state item expected for layer.weight",
    ),
    "renamed": (rename(STATE, STATE[:-3] + "fp4"), "holds quant_type 'nf4'"),
    "int4": (rename(STATE, STATE[:-3] + "int4"), "quant_type must be 'nf4' or 'fp4', got 'int4'"),
    "swapped prefix": (rename("layer.weight.absmax", "other.weight.absmax"), "missing .*absmax"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_named(state_dict, name, strict, tmp_path):
    defect, message = DEFECTS[name]
    broken = defect(state_dict)
    with pytest.raises(ValueError, match=message):
        bnb.from_state_dict(broken, strict=strict)
    contiguous = {key: np.ascontiguousarray(value) for key, value in broken.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        bnb.load_file(tmp_path / "x.safetensors", strict=strict)


def test_extra_keys_are_reported(state_dict, weight):
    extra = state_dict | {"layer.weight.code": np.ones(1)}
    with pytest.raises(ValueError, match=r"unknown keys .*\['layer.weight.code'\]"):
        bnb.from_state_dict(extra)
    with pytest.warns(UserWarning, match=r"left out unknown keys .*\['layer.weight.code'\]"):
        found = bnb.from_state_dict(extra, strict=False)
    assert set(found) == {"layer.weight", "layer.bias"}
    assert_same(found["layer.weight"], weight)


@pytest.mark.parametrize(
    ("names", "method"),
    [(["l.weight", "l.SCB"], "LLM.int8"), (["l.qweight", "l.qzeros", "l.scales"], "GPTQ and AWQ")],
)
def test_other_methods_are_refused_by_name(names, method):
    with pytest.raises(NotImplementedError, match=f"{names[1]}: {method}|{names[0]}: {method}"):
        bnb.from_state_dict({name: np.ones((2, 2), np.int8) for name in names})


@pytest.mark.parametrize("key", ["a.weight.x", "a.weight.b.c", "a.weight..", "a.b.weight.q.r.s"])
def test_keys_below_any_weight_are_found(key):
    names = {"a.weight", "a.b.weight", "a.b.weight.q", "a.bb", "b"}
    beside = ["a.weigh", "a.weightx", "a.weight", "a.weight-x", "", ".", "b", "bb.c", "a.b.c"]
    assert _below([key, *beside], names) == {key}
    assert _below([key, *beside], []) == set()


def test_names_of_many_dots_take_linear_time():
    names = [f"{number}" + ".a" * 2000 for number in range(1000)]
    began = time.perf_counter()
    assert _below(names, [f"w{name}" for name in names]) == set()
    assert time.perf_counter() - began < 1  # all prefixes would take 20 seconds
