"""The safetensors reader on files of the format's own library; test_fuzz.py has malformed ones."""

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from q4jax.interop.safetensors import TensorFile, write_file


@pytest.mark.parametrize("dtype", [np.int64, np.float32, ml_dtypes.bfloat16, np.bool_])
def test_files_of_the_library_are_read(tmp_path, dtype):
    array = np.arange(6).astype(dtype).reshape(2, 3)
    save_file({"a": array}, tmp_path / "x", metadata={"k": "v"})
    file = TensorFile(tmp_path / "x")
    assert (list(file), file.metadata) == (["a"], {"k": "v"})
    np.testing.assert_array_equal(file["a"], array)
    assert file["a"].ctypes.data % 64 == 0


def test_a_file_that_changes_is_not_read(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes() + b"more")
    with pytest.raises(ValueError, match="was changed while it was read"):
        file["a"]


def test_a_file_that_is_replaced_is_read_to_its_end(tmp_path):
    write_file(tmp_path / "x", {"a": np.arange(3), "b": np.arange(3)})
    file, reopened = TensorFile(tmp_path / "x"), TensorFile(tmp_path / "x", hold=False)
    np.testing.assert_array_equal(file["a"], reopened["a"])
    write_file(tmp_path / "x", {"a": -np.arange(3), "b": -np.arange(3)})
    np.testing.assert_array_equal(file["b"], np.arange(3))
    with pytest.raises(ValueError, match="was changed while it was read"):
        reopened["b"]


def test_files_are_closed(tmp_path):
    write_file(tmp_path / "x", {"a": np.arange(3)})
    (tmp_path / "bad").write_bytes(b"\xff" * 20)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        file = TensorFile(tmp_path / "x")
        assert len(os.listdir("/proc/self/fd")) == before + 1
        del file
        with pytest.raises(ValueError, match="cannot hold a header"):
            TensorFile(tmp_path / "bad")
    assert len(os.listdir("/proc/self/fd")) == before
