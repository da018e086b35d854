"""`QuantState`: its properties, its checks, and bitsandbytes' dict form."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import q4jax
from q4jax import QuantState
from tests.support import oracle
from tests.support.vectors import DYNAMIC_MAP

JSON = "quant_state.bitsandbytes__nf4"


@pytest.fixture(params=["plain", "nested"])
def state(request):
    w = jax.random.normal(jax.random.key(0), (3, 4, 128))
    return q4jax.quantize_4bit(w, 64, request.param == "nested", "nf4")[1]


def nested_state():
    w = jax.random.normal(jax.random.key(0), (4, 128))
    return q4jax.quantize_4bit(w, 64, True, "nf4")[1]


def test_properties(state):
    assert (state.quant_type, state.blocksize, state.dtype) == ("nf4", 64, np.float32)
    assert (state.lead, state.shape) == ((3,), (3, 4, 128))
    assert oracle.same_bits(state.code, oracle.NF4)
    assert state.nested == (state.offset is not None)
    assert repr(state) == f"QuantState({state.spec.tag()}, lead=(3,))"


@pytest.mark.parametrize("name", ["absmax", "spec", "shape", "anything"])
def test_immutable(state, name):
    with pytest.raises(AttributeError, match="QuantState is immutable"):
        setattr(state, name, None)


def test_as_dict_is_bitsandbytes(state):
    d = state.as_dict()
    scalars = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [3, 4, 128]}
    assert d["absmax"].shape == (24,)
    assert oracle.same_bits(d["quant_map"], oracle.NF4)
    if state.nested:
        assert oracle.same_bits(d["nested_quant_map"], DYNAMIC_MAP)
        scalars |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        scalars["nested_offset"] = float(state.offset)
    assert bytes(d[JSON]).decode() == json.dumps(scalars)
    assert all(isinstance(value, np.ndarray) for value in d.values())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.q_proj.weight."])
def test_dict_round_trip(state, packed, prefix):
    d = {prefix + key: value for key, value in state.as_dict(packed).items()}
    again = QuantState.from_dict(d)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_stacked_nested_state_has_no_dict():
    w = jax.random.normal(jax.random.key(0), (3, 4, 128))
    _, stacked = jax.vmap(lambda w: q4jax.quantize_4bit(w, 64, True))(w)
    with pytest.raises(ValueError, match=r"stacked .* index it first"):
        stacked.as_dict()


def without(key):
    return lambda d: {k: v for k, v in d.items() if k != key}


def with_(**values):
    return lambda d: d | values


def scalars(**values):
    """Other values in the JSON."""

    def change(d):
        text = json.dumps(json.loads(bytes(d[JSON])) | values)
        return d | {JSON: np.frombuffer(text.encode(), np.uint8)}

    return change


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tables_that_torch_wrote_in_another_default_dtype_are_read(state, dtype):
    d = state.as_dict()
    d["quant_map"] = d["quant_map"].astype(dtype)
    assert QuantState.from_dict(d).spec == state.spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(JSON), "exactly one `quant_state` item expected"),
        (lambda d: d | {JSON[:-3] + "fp4": d[JSON]}, "exactly one `quant_state` item expected"),
        (lambda d: without(JSON)(d) | {JSON[:-3] + "fp4": d[JSON]}, "fp4 holds quant_type 'nf4'"),
        (without("absmax"), r"missing keys .*\['absmax'\]"),
        (without("quant_map"), r"missing keys .*\['quant_map'\]"),
        (without("nested_absmax"), r"missing keys .*\['nested_absmax'\]"),
        (without("nested_quant_map"), r"missing keys .*\['nested_quant_map'\]"),
        (with_(surprise=np.zeros(1)), r"unknown keys .*\['surprise'\]"),
        (scalars(surprise=1), r"unknown keys .*\['surprise'\]"),
        (with_(blocksize=64), "blocksize is given twice"),
        (with_(**{"weight.absmax": np.zeros(8, np.uint8)}), "absmax is given twice"),
        (with_(absmax=np.zeros(7, np.uint8)), "absmax must be uint8 of 8 elements for nf4_b64"),
        (with_(absmax=np.zeros(8, np.float32)), "absmax must be uint8 .* got float32 of 8"),
        (with_(nested_absmax=np.zeros(2, np.float32)), "nested_absmax must be float32 of 1"),
        (with_(nested_absmax=np.zeros(1, np.float16)), "nested_absmax must be .* got float16"),
        (with_(quant_map=np.zeros(16, np.float32)), "quant_map is not the standard table"),
        (with_(quant_map=oracle.FP4), "quant_map is not the standard table"),
        (with_(quant_map=oracle.NF4.astype(np.int32)), "quant_map must be float32 or .* got int32"),
        (with_(quant_map=oracle.NF4[:15]), "quant_map is not the standard table"),
        (with_(quant_map=oracle.NF4.astype(ml_dtypes.bfloat16) * 1.05), "quant_map is not the"),
        (with_(nested_quant_map=DYNAMIC_MAP[::-1]), "nested_quant_map is not the standard table"),
        (
            with_(nested_quant_map=DYNAMIC_MAP.astype(ml_dtypes.bfloat16)),
            "nested_quant_map must be float32 or float64, got bfloat16",
        ),
        (
            with_(nested_quant_map=DYNAMIC_MAP.astype(np.float16).astype("f4")),
            "nested_quant_map is not the standard table",
        ),
        (with_(**{JSON: np.zeros(3, np.float32)}), r"must be uint8 \[n\] of JSON, got float32"),
        (with_(**{JSON: np.array([255, 254], np.uint8)}), "does not hold JSON"),
        (with_(**{JSON: np.frombuffer(b"{", np.uint8)}), "does not hold JSON"),
        (with_(**{JSON: np.frombuffer(b"[1]", np.uint8)}), "must hold a JSON object, got list"),
        (scalars(blocksize=100), "blocksize 100; allowed"),
        (scalars(blocksize=True), "blocksize must be an integer, got True"),
        (scalars(blocksize="64"), "blocksize must be an integer, got '64'"),
        (scalars(dtype="float64"), "dtype must be .* got float64"),
        (scalars(dtype="torch.float32"), "dtype must be .* got torch.float32"),
        (scalars(shape=[4, 64]), "absmax must be uint8 of 4 elements"),
        (scalars(shape=[4, -128]), "shape must"),
        (scalars(shape=[4, 128.0]), r"shape must be an integer, got 128\.0"),
        (scalars(shape=512), "shape must be a list of integers, got 512"),
        (scalars(shape=[]), "shape must have at least one axis"),
        (scalars(nested_blocksize=128), "nested_blocksize must be 256, got 128"),
        (scalars(nested_dtype="float16"), "nested_dtype must be 'float32', got 'float16'"),
        (scalars(nested_offset="1"), "nested_offset must be a finite number, got '1'"),
        (scalars(nested_offset=float("nan")), "nested_offset must be a finite number, got nan"),
        (scalars(nested_offset=None), "nested_offset must be an array of numbers, got NoneType"),
        (lambda d: {}, "exactly one `quant_state` item expected"),
    ],
)
def test_from_dict_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(change(nested_state().as_dict()))


@pytest.mark.parametrize("quant_type", [["nf4"], {"a": 1}, 4, None, "int4"])
def test_from_dict_refuses_another_quant_type(quant_type):
    d = nested_state().as_dict(packed=False) | {"quant_type": quant_type}
    with pytest.raises(ValueError, match="quant_type must be 'nf4' or 'fp4', got"):
        QuantState.from_dict(d)


F32 = jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"absmax": jnp.zeros((4, 2), F32)}, r"absmax must be uint8\[4, 2\] .* got float32"),
        (
            {"absmax": jnp.zeros((4, 3), jnp.uint8)},
            r"absmax must be uint8\[4, 2\].* got uint8\[4, 3",
        ),
        ({"nested_absmax": None}, "nested_absmax and offset must be arrays in a nested QuantState"),
        ({"offset": None}, "nested_absmax and offset must be arrays in a nested QuantState"),
        ({"offset": jnp.zeros((2,), F32)}, r"offset must be float32 .* got float32\[2\]"),
        ({"offset": jnp.zeros((), jnp.bfloat16)}, "offset must be float32 .* got bfloat16"),
        (
            {"nested_absmax": jnp.zeros((2,), F32)},
            r"nested_absmax must be float32\[1\], got .*\[2\]",
        ),
        ({"nested_absmax": jnp.zeros((1,), jnp.bfloat16)}, "nested_absmax .* got bfloat16"),
    ],
)
def test_a_state_that_does_not_fit_itself(change, message):
    state = nested_state()
    fields = {name: getattr(state, name) for name in ("absmax", "nested_absmax", "offset", "spec")}
    with pytest.raises(ValueError, match=message):
        q4jax.dequantize_4bit(jnp.zeros((4, 64), jnp.uint8), QuantState(**(fields | change)))


def test_a_plain_state_holds_no_nested_arrays():
    _, state = q4jax.quantize_4bit(jnp.ones((4, 128)))
    wrong = QuantState(state.absmax, jnp.zeros(1), jnp.zeros(()), state.spec)
    with pytest.raises(ValueError, match="nested_absmax and offset must be None in a plain"):
        q4jax.dequantize_4bit(jnp.zeros((4, 64), jnp.uint8), wrong)


@pytest.mark.parametrize(
    "value", [1e300, -1e39, 10**400, 10**5000, None, np.array([None]), "x"], ids=range(7)
)
def test_an_offset_that_float32_cannot_hold_is_refused(value):
    _, state = q4jax.quantize_4bit(jnp.ones((2, 64)), compress_statistics=True)
    d = state.as_dict(packed=False) | {"nested_offset": value}
    with pytest.raises(ValueError, match="nested_offset must be"):
        q4jax.QuantState.from_dict(d)


def test_values_that_are_no_arrays_are_named():
    class Tensor:
        def __array__(self, *args, **kwargs):
            raise RuntimeError("call detach() first")

    weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)))
    stats = weight.quant_state.as_dict()
    for data, message in ((None, "data must be an array"), (Tensor(), "data cannot be .* detach")):
        with pytest.raises(ValueError, match=message):
            q4jax.Params4bit.from_prequantized(data, stats)
    with pytest.raises(ValueError, match="quantized_stats must be a dict of arrays, got NoneType"):
        q4jax.Params4bit.from_prequantized(weight.packed, None)
    with pytest.raises(ValueError, match="absmax cannot be read"):
        q4jax.QuantState.from_dict(stats | {"absmax": Tensor()})
    with pytest.raises(ValueError, match="keys of a quant state must be str, got 3"):
        q4jax.QuantState.from_dict(stats | {3: 1})
