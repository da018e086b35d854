"""A run from a directory to an adapter: what it writes, resuming, and what is refused."""

import json
import math
import os
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax import finetune
from q4jax.finetune.folder import RunFolder
from q4jax.finetune.metrics import ProgressLine
from q4jax.interop import peft
from q4jax.models import from_pretrained

SETTINGS = {"length": 32, "batch": 4, "rank": 4, "learning_rate": 0.02, "save_every": 2}
SETTINGS |= {"eval_every": 3, "eval_rows": 8, "steps": 6, "dropout": 0.1, "loraplus": 2.0}


def settings(model, text, out, **changed):
    values = {"model": model, "data": str(text), "out": str(out), **SETTINGS, **changed}
    return finetune.Settings(**values)


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    """Return the folder of an uninterrupted run, and its numbers."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, finetune.run(settings(model, text, out, prompt="The", new_tokens=4))


def test_a_run_learns_and_writes_its_results(finished, model):
    out, numbers = finished
    assert numbers["loss_after"] < numbers["loss_before"] - 1
    assert numbers["ppl_finetuned"] == pytest.approx(math.exp(numbers["loss_after"]))
    assert numbers["text_before"].startswith("The") and numbers["text_after"].startswith("The")
    assert json.loads((out / "metrics.json").read_text()) == numbers
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    card = (out / "adapter" / "README.md").read_text()
    assert f"base_model: {json.dumps(str(model))}" in card
    assert f"| loss after | {numbers['loss_after']:.5g} |" in card
    history = RunFolder(out)
    assert [step for step, _ in history.history("loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in history.history("eval_loss")] == [0, 3, 6]
    assert history.history("learning_rate")[0][1] == pytest.approx(0.02)
    assert history.saved() == [4, 6]


def test_the_adapter_and_the_checkpoint_are_the_model(finished, model):
    """The base with PEFT's files, and the checkpoint alone, compute the same logits."""
    out, _ = finished
    tokens = jnp.arange(1, 25)[None]
    base = from_pretrained(model, q4jax.QuantConfig())
    adapted = peft.load_adapters(base, out / "adapter")
    restored = finetune.restore(out)
    assert np.array_equal(adapted(tokens), restored(tokens))
    assert not np.allclose(base(tokens), restored(tokens), atol=0.1)


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly(finished, model, text, tmp_path, monkeypatch):
    """Batches, dropout and moments go on as without a stop, after a later crash too."""
    out, numbers = finished
    monkeypatch.setattr(ProgressLine, "show", _interrupts_at(2))
    stopped = settings(model, text, tmp_path / "out", prompt="The", new_tokens=4)
    assert finetune.run(stopped) is None
    assert RunFolder(tmp_path / "out").saved() == [2]
    assert not (tmp_path / "out" / "metrics.json").exists()
    monkeypatch.undo()
    RunFolder(tmp_path / "out").record({"step": 3, "loss": 99.0})  # no checkpoint holds it
    resumed = finetune.resume(tmp_path / "out")
    for name in ("loss", "eval_loss", "grad_norm"):
        assert RunFolder(tmp_path / "out").history(name) == RunFolder(out).history(name)
    assert {**resumed, "seconds": 0} == {**numbers, "seconds": 0}


def _interrupts_at(step):
    """Return a `ProgressLine.show` during which Ctrl-C is pressed."""

    def show(self, at, loss, speed):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)

    return show


@pytest.mark.slow
def test_a_finished_run_is_kept_or_trained_further(finished, tmp_path, model, text):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    with pytest.raises(finetune.SettingsError, match="holds a run: --resume continues it, --over"):
        finetune.run(settings(model, text, out))
    refused = {
        "rank": (8, "--rank 8 is not that of the run to resume, 4; --overwrite begins a new run"),
        "steps": (5, "--steps must be at least 6, the steps that the run has done, got 5"),
        "data": ((str(tmp_path / "other.txt"),), "--data is not what the run began with"),
    }
    (tmp_path / "other.txt").write_text("Another text. " * 100)
    for name, (value, message) in refused.items():
        with pytest.raises(finetune.SettingsError, match=message):
            finetune.resume(out, **{name: value})
    assert RunFolder(out).description() == RunFolder(finished[0]).description()
    numbers = finetune.resume(out, steps=7)
    assert numbers["steps"] == 7
    assert RunFolder(out).history("loss")[:6] == RunFolder(finished[0]).history("loss")
    assert RunFolder(out).saved() == [6, 7]


def test_another_base_is_refused(finished, model, text, tmp_path):
    out, other = tmp_path / "out", tmp_path / "model"
    shutil.copytree(finished[0], out)
    dense = from_pretrained(model)
    kernel = dense.layers.mlp.up_proj.kernel
    kernel[...] = kernel[...] * 2
    shutil.copytree(model, other)
    (other / "model.safetensors").unlink()
    (other / "config.json").unlink()
    q4jax.models.save_pretrained(dense, other)
    with pytest.raises(finetune.SettingsError, match="--resume: the adapters belong to base"):
        finetune.resume(out, model=str(other))


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(model, text, tmp_path):
    """Parts are weighted by what they learn, so that the split does not matter."""
    plain = {"dropout": 0.0, "steps": 3, "held_out": 0.0}
    runs = {
        parts: finetune.run(settings(model, text, tmp_path / str(parts), accumulate=parts, **plain))
        for parts in (1, 2)
    }
    assert runs[1]["loss_after"] is None
    one, two = (RunFolder(tmp_path / str(parts)) for parts in runs)
    for name in ("loss", "grad_norm"):
        first, second = (np.array(folder.history(name)) for folder in (one, two))
        np.testing.assert_allclose(first, second, rtol=2e-5)
