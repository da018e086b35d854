"""The fine-tuning example: the main job's files and numbers, and what others do with them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for _package in ("gguf", "tokenizers", "grain", "jinja2", "matplotlib"):
    pytest.importorskip(_package)

finetune = pytest.importorskip("finetune")
demo = pytest.importorskip("demo")
pretrain = pytest.importorskip("pretrain")
runs = pytest.importorskip("runs")

import q4jax  # noqa: E402
from q4jax.cli import main as cli  # noqa: E402
from q4jax.finetune import Document, Piece  # noqa: E402
from q4jax.finetune.folder import RunFolder  # noqa: E402
from q4jax.models import from_pretrained, save_pretrained  # noqa: E402
from tests.support.tiny_hub_model import write_model  # noqa: E402

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog. " * 100
STEPS = 6
KEYS = {
    "ppl_dense",
    "ppl_quantized",
    "ppl_finetuned",
    "bits_per_weight",
    "restored_bit_identical",
    "second_process_pid",
    "steps",
    "tokens",
    "seconds",
    "text_before",
    "text_after",
}


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Let the second process import the same q4jax as this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Write a Hugging Face directory with a byte tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def arguments(inputs, out, steps=STEPS):
    options = {"model": inputs / "model", "data": inputs / "text.txt", "out": out, "steps": steps}
    options |= {"batch": 2, "length": 32, "save-every": 4, "eval-every": 3, "eval-rows": 4}
    options |= {"new-tokens": 4, "prompt": "The", "learning-rate": 0.02}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    finetune.main([*arguments(inputs, out), "--dense-baseline"])
    return out


@pytest.mark.slow
def test_metrics_and_files(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    assert metrics["ppl_finetuned"] < metrics["ppl_quantized"]
    assert metrics["ppl_dense"] == pytest.approx(metrics["ppl_quantized"], rel=0.2)
    assert 4.1 < metrics["bits_per_weight"] < 4.2
    assert metrics["restored_bit_identical"] is True
    assert metrics["second_process_pid"] != os.getpid()
    assert (metrics["steps"], metrics["tokens"]) == (STEPS, STEPS * 2 * 32)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "checkpoint").is_dir()


@pytest.mark.heavy
def test_without_options_the_demo_is_trained(inputs, tmp_path, monkeypatch, capsys):
    """The model and the text of the demo take their place, also where the run resumes."""

    texts = [[Document("a text", (Piece(text, True),))] for text in (TEXT, TEXT[:700])]
    monkeypatch.setattr(pretrain, "folder", lambda: inputs / "model")
    monkeypatch.setattr(demo, "documents", lambda: texts)
    options = arguments(inputs, tmp_path / "out", 1)[4:]
    finetune.main([*options, "--eval-length", "64"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["ppl_dense"] > 0 and metrics["restored_bit_identical"] is True
    finetune.main(["--out", str(tmp_path / "out"), "--resume", "--steps", "2"])
    assert [step for step, _ in RunFolder(tmp_path / "out").history("loss")] == [1, 2]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(inputs / "model")
    with pytest.raises(SystemExit):
        finetune.main(["--out", str(tmp_path / "out")])
    assert "--resume continues it, --overwrite" in capsys.readouterr().err


@pytest.mark.heavy
def test_ctrl_c_leaves_a_usable_checkpoint(inputs, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "examples" / "finetune.py", *arguments(inputs, out, 10**6)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        log, deadline = out / "log.jsonl", time.monotonic() + 300
        while not (log.is_file() and '"loss"' in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "--resume goes on" in process.communicate(timeout=120)[0]
    assert process.returncode == 0
    folder = RunFolder(out)
    assert folder.saved()[-1] == len(folder.history("loss")) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "holds no run"),
        (["--data", "nowhere"], "--data: nowhere: No such file"),
        (["--prompt", ""], "--prompt must be a text that is not empty"),
        (["--blocksize", "100"], "--blocksize must be one of .*100"),
        (["--steps", "many"], "--steps: must be an integer of at least 1, got 'many'"),
        (["--model", "nowhere"], r"there is no directory nowhere"),
        (["--out", __file__], "is no folder"),
    ],
)
def test_bad_options_are_one_line(inputs, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as error:
        finetune.main([*arguments(inputs, tmp_path / "out"), *options])
    assert error.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


@pytest.mark.heavy
def test_the_result_is_usable(inputs, finished, tmp_path, capsys):
    """generate.py continues the run, and the base with its adapter; export.py writes a model."""
    import export
    import generate as example

    how = ["--prompt", "The quick", "--max-new-tokens", "8"]
    texts = []
    export.main([str(finished), str(tmp_path / "merged")])
    for source in (
        [str(finished)],
        [str(inputs / "model"), "--adapter", str(finished / "adapter"), "--quantize", "nf4"],
        [str(tmp_path / "merged")],
    ):
        capsys.readouterr()
        example.main([*source, *how])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    example.main([str(inputs / "model"), *how])
    assert capsys.readouterr().out != texts[0]
    assert cli(["convert", str(finished), str(tmp_path / "again"), "--to", "huggingface"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        expected = (tmp_path / "merged" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == expected
    export.main([str(finished), str(tmp_path / "small"), "--four-bit"])
    assert runs.is_quantized(tmp_path / "small")
    with pytest.raises(SystemExit, match="merged exists already"):
        export.main([str(finished), str(tmp_path / "merged")])


@pytest.mark.heavy
def test_a_directory_in_4_bits_is_trained(inputs, tmp_path, capsys):
    """Its own quantization is kept, a run on it resumes, and bfloat16 logits are compared."""
    dense = from_pretrained(inputs / "model", dtype="bfloat16")
    save_pretrained(
        q4jax.quantize_model(dense, quant_type="fp4", blocksize=32, skip=("lm_head", "up_proj")),
        tmp_path / "small",
        tokenizer=inputs / "model",
    )
    out = tmp_path / "out"
    options = ["--model", str(tmp_path / "small")]
    with pytest.raises(SystemExit):
        finetune.main([*arguments(inputs, out, 1), *options, "--dense-baseline"])
    assert "--dense-baseline: --model is in 4 bits already" in capsys.readouterr().err
    finetune.main([*arguments(inputs, out, 1), *options])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["restored_bit_identical"] is True
    assert metrics["ppl_dense"] is None
    finetune.main(["--out", str(out), "--resume", "--steps", "2"])


@pytest.mark.slow
@pytest.mark.heavy
def test_on_a_mesh_and_on_another(inputs, tmp_path):
    """Eight simulated devices give the perplexities of one, and another mesh resumes the run."""

    def run(name, steps, *options):
        out = tmp_path / name
        command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--out", str(out)]
        given = [*arguments(inputs, out, steps), "--blocksize", "32", "--batch", "4"]
        given = [*given, "--dense-baseline"] if "--resume" not in options else []
        subprocess.run([*command, *given, *options], check=True, capture_output=True, timeout=500)
        return json.loads((out / "metrics.json").read_text())

    def perplexities(metrics):
        return np.array([metrics[f"ppl_{which}"] for which in ("dense", "quantized", "finetuned")])

    one = run("one", 4)
    eight = run("eight", 4, "--mesh", "fsdp=4,tensor=2")
    assert eight["restored_bit_identical"]
    np.testing.assert_allclose(perplexities(eight), perplexities(one), rtol=1e-4)
    other = run("eight", 5, "--resume", "--steps", "5", "--mesh", "data=2,tensor=4")
    assert other["restored_bit_identical"]
    one = run("one", 5, "--resume", "--steps", "5")
    np.testing.assert_allclose(perplexities(other), perplexities(one), rtol=1e-4)
