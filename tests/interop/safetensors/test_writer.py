"""The safetensors writer: readable by the format's own library, and by q4jax's strict reader."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from q4jax.interop.safetensors import TensorFile, write_file, writer


def test_the_library_reads_what_is_written(tmp_path):
    write_file(tmp_path / "x", {"a": np.arange(3)}, metadata={"format": "pt"})
    np.testing.assert_array_equal(load_file(tmp_path / "x")["a"], np.arange(3))


@pytest.mark.parametrize("dtype", ["U3", ">f4", "O"])
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(TypeError):
        write_file(tmp_path / "x", {"w": np.zeros(2, dtype)})
    assert not list(tmp_path.iterdir())


def axes(count):
    return {"w": np.zeros((1,) * count, np.uint8)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"__metadata__": np.ones(2)}, None, "'__metadata__' is no name of a tensor"),
        ({1: np.ones(2)}, None, "1 is no name of a tensor"),
        ({"a\udc80": np.ones(2)}, None, r"'a\\udc80' is no name of a tensor"),
        ({"n" * 4097: np.ones(2)}, None, r"'n{40}'\.\.\. is a name of 4097 characters"),
        (axes(33), None, "'w' has no valid shape"),
        (axes(1), {"step": 1}, "metadata must hold texts by name, got 'step': 1"),
        (axes(1), {2: "x"}, "metadata must hold texts by name, got 2: 'x'"),
        (axes(1), {"x": None}, "metadata must hold texts by name, got 'x': None"),
        (axes(1), {"x": "\ud800"}, "metadata must hold texts by name"),
    ],
)
def test_what_would_not_be_read_is_not_written(tmp_path, tensors, metadata, message):
    path = tmp_path / "x"
    with pytest.raises(ValueError, match=message):
        write_file(path, tensors, metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_a_header_that_would_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_HEADER", 1000)
    with pytest.raises(ValueError, match="the header would have 10.. bytes, 1000 are allowed"):
        write_file(tmp_path / "x", axes(1), metadata={"x": "y" * 1000})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensors",
    [{"n" * 4096: np.ones(2)}, axes(32), {"": np.ones(2), "é/\n\x00": np.ones((2, 0))}, {}],
    ids=["name", "axes", "odd", "none"],
)
def test_what_is_at_the_limits_is_read_back(tmp_path, tensors):
    write_file(tmp_path / "x", tensors, metadata={"": "é", "b": "\x00"})
    file = TensorFile(tmp_path / "x")
    assert file.metadata == {"": "é", "b": "\x00"}
    assert file.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(file[name], array)


def test_a_tensor_that_is_not_as_planned_leaves_the_old_file(tmp_path):
    write_file(tmp_path / "x", {"w": np.ones(2)})
    before = (tmp_path / "x").read_bytes()
    layouts = {"w": jax.ShapeDtypeStruct((3,), np.dtype(np.float64))}
    with pytest.raises(ValueError, match="w is ShapeDtypeStruct.*, expected"):
        write_file(tmp_path / "x", {"w": np.ones(2)}, layouts=layouts)
    assert (tmp_path / "x").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
