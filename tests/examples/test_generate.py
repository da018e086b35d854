"""The generation example on a tiny model: texts of all prompts, speed and memory."""

import pytest
from flax import nnx

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

example = pytest.importorskip("generate")

from q4jax.models import Llama, LlamaConfig, save_pretrained  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(64, 64, 128, 2, 2, 1, 32, max_position_embeddings=64)
    save_pretrained(Llama(config, rngs=nnx.Rngs(0)), folder)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("options", [[], ["--dense"], ["--temperature", "1", "--top-p", "0.9"]])
def test_texts_and_figures(folder, options, capsys):
    figures = example.main(
        ["--model", str(folder), "--prompt", "w1 w2 w3", "w4", "--new-tokens", "6", *options]
    )
    printed = capsys.readouterr().out
    assert printed.startswith("w1 w2 w3w") and "\nw4w" in printed
    assert len(printed.partition("\n")[0].split()) == 3 + 5  # the last word is joined to the first
    assert figures["tokens_per_second"] > 0
    assert f"{figures['tokens_per_second']:.1f} tokens/s" in printed
    assert ("weights in 4 bits" in printed) and ("4-bit codes" in printed) == (
        "--dense" not in options
    )
    assert figures["peak_bytes"] > figures["model_bytes"] > 0
