"""The generation example on a tiny model: texts of all prompts, speed and memory."""

import pytest
from flax import nnx

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

example = pytest.importorskip("generate")

import q4jax  # noqa: E402
from q4jax.models import Llama, LlamaConfig, from_pretrained, save_pretrained  # noqa: E402


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "100"], "max_new_tokens=100: 101 is above the model's context of 64"),
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--top-k", "65"], "top_k must be from 0 to vocab_size=64, got 65"),
        (["--prompt", ""], "prompt 0 of input_ids has no tokens"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_options_out_of_range_are_one_line(folder, options, message):
    with pytest.raises(SystemExit, match=message):
        example.main(["--model", str(folder), "--prompt", "w1", *options])


def test_malformed_options(folder, capsys):
    for options, message in (
        (["--new-tokens", "0"], "must be an integer of at least 1, got '0'"),
        (["--run", "out"], "--run goes without --model"),
    ):
        with pytest.raises(SystemExit):
            example.main(["--model", str(folder), *options])
        assert message in capsys.readouterr().err


@pytest.mark.heavy
def test_a_directory_in_4_bits(folder, tmp_path, capsys):
    small = q4jax.quantize_model(from_pretrained(folder))
    save_pretrained(small, tmp_path / "small", tokenizer=folder)
    how = ["--prompt", "w1 w2", "--new-tokens", "6"]
    texts = {}
    for name, options in {
        "while loading": ["--model", str(folder)],
        "before": ["--model", str(tmp_path / "small")],
        "dense": ["--model", str(tmp_path / "small"), "--dense"],
    }.items():
        example.main([*options, *how])
        printed = capsys.readouterr().out
        texts[name] = printed.split("\nfirst token")[0]
        assert ("4-bit codes" in printed) == (name != "dense")
    assert texts["while loading"] == texts["before"] == texts["dense"]
