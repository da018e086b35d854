"""The fine-tuning example on a tiny model: its files, exact resumption, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flax import nnx

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

finetune = pytest.importorskip("finetune")
runs = pytest.importorskip("runs")

from q4jax.models import Llama, LlamaConfig, save_pretrained  # noqa: E402

ROOT = Path(__file__).parents[2]
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
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
    )
    save_pretrained(Llama(config, rngs=nnx.Rngs(0)), folder / "model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return folder


def arguments(inputs, out, steps=STEPS):
    options = {"model": inputs / "model", "data": inputs / "text.txt", "out": out, "steps": steps}
    options |= {"batch": 2, "length": 32, "save-every": 4, "eval-every": 3, "eval-windows": 1}
    options |= {"new-tokens": 4, "prompt": "The", "learning-rate": 0.02}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    finetune.main(arguments(inputs, out))
    return out


@pytest.mark.slow
def test_metrics_and_files(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    assert metrics["ppl_finetuned"] < metrics["ppl_quantized"]
    assert 4.1 < metrics["bits_per_weight"] < 4.2
    assert metrics["restored_bit_identical"] is True
    assert metrics["second_process_pid"] != os.getpid()
    assert (metrics["steps"], metrics["tokens"]) == (STEPS, STEPS * 2 * 32)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "checkpoint").is_dir()


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(inputs, finished, tmp_path, monkeypatch):
    class AfterTwoSteps(runs.Interrupt):
        @property
        def asked(self):
            self.looked_at += 1
            return len(runs.Run(tmp_path).history("loss")) == 2

        @asked.setter
        def asked(self, _):
            self.looked_at = 0

    monkeypatch.setattr(runs, "Interrupt", AfterTwoSteps)
    finetune.main(arguments(inputs, tmp_path))
    assert not (tmp_path / "metrics.json").exists()
    assert [step for step, _ in runs.Run(tmp_path).history("loss")] == [1, 2]
    monkeypatch.undo()
    runs.Run(tmp_path).log(step=3, loss=99.0)  # of a step that no checkpoint holds

    finetune.main(["--out", str(tmp_path), "--resume"])
    for name in ("loss", "perplexity"):
        assert runs.Run(tmp_path).history(name) == runs.Run(finished).history(name)
    one, other = (json.loads((f / "metrics.json").read_text()) for f in (tmp_path, finished))
    changing = {"seconds", "second_process_pid"}
    assert {k: one[k] for k in one.keys() - changing} == {
        k: other[k] for k in other.keys() - changing
    }


@pytest.mark.heavy
def test_ctrl_c_leaves_a_usable_checkpoint(inputs, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "examples" / "finetune.py", *arguments(inputs, out, 10**6)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        log, deadline = out / "log.jsonl", time.monotonic() + 300
        while not (log.is_file() and '"loss"' in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "--resume" in process.communicate(timeout=120)[0]
    assert process.returncode == 0
    _, optimizer = finetune.restore(runs.Run(out), finetune.RunSharding(None, 64))
    assert int(optimizer.step[...]) == len(runs.Run(out).history("loss")) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "holds no run"),
        (["--length", "5000"], "has 4050 tokens"),
        (["--model", "nowhere"], r"no .*nowhere/tokenizer\.json"),
    ],
)
def test_bad_options_are_named(inputs, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        finetune.main([*arguments(inputs, tmp_path), *options])


def test_bad_quantization_is_an_error_before_any_work(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load_model", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="invalid blocksize 63"):
        finetune.main([*arguments(inputs, tmp_path), "--blocksize", "63"])


def test_another_text_is_refused_on_resume(inputs, finished, tmp_path):
    settings = json.loads((finished / "run.json").read_text())
    (tmp_path / "text.txt").write_text("Another text. " * 100)
    settings["data"] = str(tmp_path / "text.txt")
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="not the text"):
        finetune.main(["--out", str(tmp_path), "--resume"])


def test_batches_depend_on_seed_and_step_alone():
    import numpy as np

    tokens = np.arange(1000, dtype=np.int32)
    batch = runs.batch(tokens, 1, 2, size=3, length=8)
    assert batch.shape == (3, 9)
    assert (np.diff(batch, axis=1) == 1).all()
    np.testing.assert_array_equal(batch, runs.batch(tokens, 1, 2, size=3, length=8))
    assert not np.array_equal(batch, runs.batch(tokens, 1, 3, size=3, length=8))
    assert not np.array_equal(batch, runs.batch(tokens, 2, 2, size=3, length=8))
    assert runs.batch(tokens[:9], 0, 0, size=4, length=8).max() == 8


@pytest.mark.slow
@pytest.mark.heavy
def test_on_a_mesh_and_on_another(inputs, tmp_path):
    """Eight simulated devices give the perplexities of one, and another mesh restores the run."""

    def run(name, *options):
        out = tmp_path / name
        command = [sys.executable, str(ROOT / "examples" / "finetune.py")]
        settings = [*arguments(inputs, out, 4), "--blocksize", "32", "--batch", "4", *options]
        subprocess.run([*command, *settings], check=True, capture_output=True, timeout=500)
        return json.loads((out / "metrics.json").read_text())

    def perplexities(metrics):
        return [metrics[f"ppl_{which}"] for which in ("dense", "quantized", "finetuned")]

    one = run("one")
    eight = run("eight", "--mesh", "fsdp=4,tensor=2")
    assert eight["restored_bit_identical"]
    assert perplexities(eight) == pytest.approx(perplexities(one), rel=1e-4)
    other = run("eight", "--resume", "--mesh", "data=2,tensor=4")
    assert other["restored_bit_identical"]
    assert perplexities(other) == pytest.approx(perplexities(one), rel=1e-4)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "fsdp=2,fsdp=2", "fsdp=2,", "fsdp=-1"])
def test_meshes_that_are_none(text):
    from meshes import sizes

    with pytest.raises(ValueError, match="--mesh"):
        sizes(text)
