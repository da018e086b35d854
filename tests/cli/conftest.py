"""A tiny model with a tokenizer, and an adapter of it."""

import jax
import pytest

import q4jax
from q4jax.cli import main
from q4jax.interop import peft
from q4jax.models import from_pretrained


@pytest.fixture
def run(capsys):
    """Return a function that runs a command: (exit code, stdout, stderr)."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the directory of a random Llama with a tokenizer of bytes."""
    pytest.importorskip("tokenizers")
    from tests.support import tiny_hub_model

    return tiny_hub_model.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory):
    """Return the directory of an adapter that changes the model's text."""
    model = q4jax.add_lora(from_pretrained(tiny, q4jax.QuantConfig()), 4, 8.0)
    for number, layer in enumerate(["q_proj", "v_proj", "o_proj"]):
        b = getattr(model.layers.self_attn, layer).lora_b
        b[...] = jax.random.normal(jax.random.key(number), b.shape) / 2
    path = tmp_path_factory.mktemp("adapters") / "a"
    peft.save_adapters(model, path)
    return path
