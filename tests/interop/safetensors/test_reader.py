"""The safetensors reader on files of the format's own library; test_fuzz.py has malformed ones."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from q4jax.interop.safetensors import TensorFile


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
    save_file({"a": np.arange(4)}, tmp_path / "x")
    with pytest.raises(ValueError, match="was changed while it was read"):
        file["a"]
