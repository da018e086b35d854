"""A fine-tuning run of models that have little in common, from their directories to text."""

import string

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import q4jax
from q4jax import finetune
from q4jax.interop import peft
from q4jax.models import from_pretrained, generate
from tests.support.random_weights import entries_of, write_directory

# Experts apart and in one tensor, windows, recurrent states, latent attention, biases of positions.
FAMILIES = (
    "bloom",
    "deepseek_v3",
    "gemma4_text",
    "gpt2",
    "gpt_oss",
    "granitemoe",
    "llama4_text",
    "mixtral",
    "phi3",
    "qwen3_next",
)


def write_tokenizer(folder, vocab_size):
    """A token for each character, as many as the model has."""
    known = {c: i for i, c in enumerate(string.printable[:vocab_size])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.heavy
@pytest.mark.parametrize("case", FAMILIES)
def test_fine_tune_and_continue_a_text(case, text, tmp_path):
    base, out = tmp_path / case, tmp_path / "out"
    write_directory(case, base)
    write_tokenizer(base, entries_of(case)["vocab_size"])
    numbers = finetune.run(
        finetune.Settings(
            model=str(base),
            data=str(text),
            out=str(out),
            steps=2,
            length=24,
            batch=2,
            rank=2,
            eval_rows=2,
            dtype="float32",
            prompt="the",
            new_tokens=3,
        )
    )
    assert len(numbers["text_after"]) > len("the")
    tokens = jnp.arange(1, 13)[None]
    plain = from_pretrained(base, q4jax.QuantConfig(), dtype="float32")
    adapted = peft.load_adapters(plain, out / "adapter")
    np.testing.assert_allclose(adapted(tokens), finetune.restore(out)(tokens), rtol=1e-5, atol=1e-5)
    assert not np.array_equal(adapted(tokens), plain(tokens))
    (continued,) = generate(adapted, [[1, 2, 3]], max_new_tokens=4)
    assert len(continued) == 3 + 4
