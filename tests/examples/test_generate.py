"""The generation example: the command with a model of its own, and the demo's as a directory."""

import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

example = pytest.importorskip("generate")

import demo  # noqa: E402
import gguf_llama  # noqa: E402

from q4jax.cli import main as cli  # noqa: E402
from tests.support.tiny_hub_model import write_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.slow
def test_it_is_the_command(folder, capsys, monkeypatch):
    how = ["--prompt", "The quick", "--max-new-tokens", "5", "--quiet"]
    assert cli(["generate", str(folder), *how]) == 0
    expected = capsys.readouterr()
    example.main([str(folder), *how])
    assert capsys.readouterr() == expected
    monkeypatch.setattr(demo, "model_file", lambda: "file")
    monkeypatch.setattr(gguf_llama, "directory", {"file": folder}.get)
    example.main([])
    assert capsys.readouterr().out.startswith("The capital of France is")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--adapter", "nowhere"], "nowhere is no PEFT adapter"),
    ],
)
def test_a_wrong_option_is_one_line(folder, options, message, capsys):
    with pytest.raises(SystemExit) as error:
        example.main([str(folder), "--prompt", "a", *options])
    [line] = capsys.readouterr().err.splitlines()
    assert (error.value.code, message in line) == (2, True)
