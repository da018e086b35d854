"""`python -m q4jax merge`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.interop import peft
from q4jax.models import from_pretrained

IDS = jnp.array([[1, 2, 3, 4, 5, 6]])


def logits(folder, adapter=None, **settings):
    model = from_pretrained(folder, **settings)
    model = model if adapter is None else peft.load_adapters(model, adapter)
    return np.asarray(model(IDS), np.float32)


def close(one, other, tolerance):
    return np.abs(one - other).max() <= tolerance * np.abs(other).max()


def test_16_bits(run, tiny, adapter, tmp_path):
    code, out, _ = run("merge", tiny, adapter, tmp_path / "out")
    assert (code, "dense, with the adapter merged" in out) == (0, True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("bfloat16", False)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny / "tokenizer.json"
    ).read_bytes()
    expected, found = logits(tiny, adapter), logits(tmp_path / "out", dtype=jnp.float32)
    assert close(found, expected, 0.05) and not close(logits(tiny), expected, 0.2)
    assert run("merge", tiny, adapter, tmp_path / "f", "--dtype", "float32")[0] == 0
    assert close(logits(tmp_path / "f"), expected, 1e-5)


def test_4_bits(run, tiny, adapter, tmp_path):
    code, out, _ = run("merge", tiny, adapter, tmp_path / "out", "--four-bit")
    assert (code, "largest error of quantizing again" in out) == (0, True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    expected = logits(tiny, adapter, quantization=q4jax.QuantConfig())
    assert close(logits(tmp_path / "out"), expected, 0.4)
    assert not close(logits(tiny), expected, 0.4)
    again, _, err = run("merge", tmp_path / "out", adapter, tmp_path / "out", "--four-bit")
    assert (again, f"{tmp_path / 'out'} exists already" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tiny}", "{out}"], "is no run of finetune: name an adapter to merge"),
        (["{tiny}", "/nowhere", "{out}"], "/nowhere is no PEFT adapter"),
        (["{tiny}", "{adapter}", "{out}", "--quant-storage", "uint8"], "needs --four-bit"),
        (["{tiny}", "{adapter}", "{out}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{tiny}"], "the following arguments are required"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(
    run, tiny, adapter, tmp_path, arguments, message
):
    given = {"tiny": tiny, "adapter": adapter, "out": tmp_path / "out"}
    code, out, err = run("merge", *(argument.format(**given) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())
