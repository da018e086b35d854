"""The model that the demo trains: once, kept, verified; and its cost in 4 bits is measured."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("tokenizers")

demo = pytest.importorskip("demo")
pretrain = pytest.importorskip("pretrain")

from q4jax.finetune import Tokenizer  # noqa: E402
from q4jax.models import from_pretrained  # noqa: E402

TEXTS = {False: "I have a love of thee. ", True: "I haue a loue of thee. "}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Make the recipe a small one, on texts that are there."""
    monkeypatch.setenv("Q4JAX_CACHE", str(tmp_path))
    sizes = {"vocab_size": 280, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    monkeypatch.setattr(pretrain, "CONFIG", dataclasses.replace(pretrain.CONFIG, **sizes))
    for name, value in {"STEPS": 30, "ROWS": 4, "LENGTH": 16, "RATE": 0.01}.items():
        monkeypatch.setattr(pretrain, name, value)
    works = {old: ({"a": text * 40}, text * 1500) for old, text in TEXTS.items()}
    monkeypatch.setattr(demo, "works", lambda *, old_spelling=False: works[old_spelling])


@pytest.mark.slow
def test_a_model_is_trained_once(small, capsys, monkeypatch):
    folder = pretrain.folder()
    assert "perplexity of a play that it has not read" in capsys.readouterr().out
    model, tokenizer = from_pretrained(folder), Tokenizer.load(folder)
    assert tokenizer.eos == 0 and tokenizer.decode(tokenizer.encode(TEXTS[True])) == TEXTS[True]
    tokens = tokenizer.encode(TEXTS[False] * 1500)
    dense, quantized = pretrain.measure(model, tokens)
    assert 1 < dense < 3  # a text that repeats; a model that has learned nothing has 280
    assert quantized == pytest.approx(dense, rel=0.2) and quantized != dense
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train", lambda *_: pytest.fail("trained again"))
        assert pretrain.folder() == folder
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    monkeypatch.setattr(pretrain, "train", lambda *_: model)
    assert pretrain.folder() == folder
    assert np.array_equal((folder / "model.safetensors").read_bytes(), weights)
