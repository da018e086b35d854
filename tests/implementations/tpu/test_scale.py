"""`benchmarks/scale.py --target` compiles a step of QLoRA for a slice of TPUs that is not here."""

import json
import sys

import pytest
import scale  # benchmarks/ is on the path by conftest.py

from tests.support.tpu.targets import MISSING


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scale.py", *arguments])
    scale.main()


@pytest.mark.heavy
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_a_tiny_model(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    run(monkeypatch, "--target", "v5e", "--models", "tiny", "--devices", "8", "--out", str(out))
    [row] = json.loads(out.read_text())["rows"]
    assert capsys.readouterr().out.startswith("tiny on fsdp=8: arguments 0.00 GB, temporary 0.")
    config = scale.MODELS["tiny"]
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (4 * h * h + 3 * h * f)
    # Codes and scales: for the forward pass, and once for both halves of the backward pass.
    codes = 2 * (weights // 2 + weights // 64)
    assert row["moved_by_kind"]["all-gather u8"] == codes
    assert row["tokens"] == 8 * scale.LENGTH
    assert 0 < row["arguments"] < 5e6  # 3.9e6 when this was written
    assert 0 < row["temporary"] < 95e6  # 85e6


def test_without_libtpu_it_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--target", "v5e")
    assert stopped.value.code == (
        "scale.py: --target v5e needs libtpu, which is not installed: pip install 'q4jax[tpu]'"
    )


@pytest.mark.parametrize(("target", "counts"), [("cpu", "8, 64, 512"), ("v5e", "8, 64, 256")])
def test_a_number_of_devices_that_a_target_lacks_is_one_line(target, counts, monkeypatch):
    monkeypatch.setattr("scale_targets.why_unreached", lambda target: None)
    wanted = "256" if target == "cpu" else "512"
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--target", target, "--devices", "8", wanted)
    assert stopped.value.code == f"scale.py: --target {target} has {counts} devices"


def test_a_program_that_takes_too_long_is_a_row(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--models", "tiny", "--devices", "8", "--minutes", "0.001")
    assert stopped.value.code == 1
    expected = "tiny on fsdp=8: not compiled: took more than 0.001 minutes\n"
    assert capsys.readouterr().out == expected


def test_a_program_that_fails_is_a_row_with_its_last_error(monkeypatch, capsys):
    failing = "import sys; sys.exit('Traceback\\nValueError: too many\\nnoise')"
    monkeypatch.setattr(scale, "command_of", lambda *_: [sys.executable, "-c", failing])
    with pytest.raises(SystemExit):
        run(monkeypatch, "--models", "tiny", "--devices", "8")
    assert capsys.readouterr().out == "tiny on fsdp=8: not compiled: ValueError: too many\n"
