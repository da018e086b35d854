"""`benchmarks/tpu.py` without a TPU: the flow, what it writes, and that its checks can fail."""

import json

import jax
import pytest
import tpu

from q4jax.pallas.tpu import matmul


@pytest.fixture(autouse=True)
def fresh():
    """What is traced within a test is neither taken from another nor left to one."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def dry(folder):
    code = tpu.main(["--dry-run", "--out", str(folder), "--threads", "2"])
    return code, json.loads((folder / "tpu.json").read_text())


@pytest.mark.heavy
def test_dry_run(tmp_path, capsys):
    code, results = dry(tmp_path)
    out = capsys.readouterr().out
    assert (code, results["failures"], results["dropped"]) == (0, [], [])
    assert out.rstrip().endswith("**Nothing failed.**")
    assert "mean nothing" in (tmp_path / "tpu.md").read_text()
    assert {name: found["run"] for name, found in results["checks"].items()} == {
        "xla": 5,
        "pallas_tpu_interpret": 5,
    }
    for row, operation in zip(results["rows"], tpu.OPERATIONS, strict=True):
        assert row["operation"] == operation
        assert {"dense", "xla", "pallas_tpu_interpret"} <= row["us"].keys()
        assert min(row["us"].values()) > 0


@pytest.mark.heavy
def test_a_wrong_kernel_is_named_last_and_the_others_are_timed(tmp_path, monkeypatch, capsys):
    right = matmul.linear

    def wrong(*args, **kwargs):
        return right(*args, **kwargs).at[-1, -1].add(1)

    monkeypatch.setattr(matmul, "linear", wrong)
    code, results = dry(tmp_path)
    failures = results["checks"]["pallas_tpu_interpret"]["failures"]
    assert code == 1
    assert {failure["operation"] for failure in failures} == {"linear"}
    times = {row["operation"]: row["us"].keys() for row in results["rows"]}
    assert "pallas_tpu_interpret" not in times["linear"]
    assert "pallas_tpu_interpret" in times["linear_transpose"]
    last = capsys.readouterr().out.rstrip().splitlines()[-2:]
    assert last[0].startswith("- FAILED pallas_tpu_interpret: linear ")
    assert last[1] == f"**{len(failures)} failed**"


def test_no_tpu(tmp_path, capsys):
    assert tpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "no TPU is visible to jax; --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
