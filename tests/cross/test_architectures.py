"""Directories of every architecture that q4jax writes, read by transformers."""

import sys
from pathlib import Path

import numpy as np
import pytest

from q4jax.models import from_pretrained, save_pretrained

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "vectors"))

from random_weights import CASES, write_directory


def their_logits(folder, vectors):
    """Of the real tokens, `[N, vocab_size]`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    mask = torch.tensor(vectors["attention_mask"], dtype=torch.long)
    ids = torch.tensor(vectors["input_ids"], dtype=torch.long)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits.numpy()
    return logits[vectors["attention_mask"] == 1]


@pytest.mark.parametrize("case", CASES)
def test_our_directory_there(case, tmp_path):
    vectors = write_directory(case, tmp_path / "theirs")
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    expected = vectors["logits"][vectors["attention_mask"] == 1]
    found = their_logits(tmp_path / "ours", vectors)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
