"""The safetensors writer: atomic, and readable by the format's own library."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from q4jax.interop.safetensors import write_file


def test_the_library_reads_what_is_written(tmp_path):
    write_file(tmp_path / "x", {"a": np.arange(3)}, metadata={"format": "pt"})
    np.testing.assert_array_equal(load_file(tmp_path / "x")["a"], np.arange(3))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_file(path, {"w": np.ones(2)})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, {"w": np.ones(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", ["U3", ">f4", "O"])
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(TypeError):
        write_file(tmp_path / "x", {"w": np.zeros(2, dtype)})
    assert not list(tmp_path.iterdir())
