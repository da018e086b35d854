"""A model by its name on the hub, from a local server of the hub's protocol."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("huggingface_hub")

from q4jax import finetune
from q4jax.finetune.hub import HubModel
from tests.finetune.local_hub import LocalHub


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """Return the running server; the cache is a new one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with LocalHub(model) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_model_is_found_by_its_name(hub, model, text, tmp_path, revision):
    settings = finetune.Settings(
        model=f"org/tiny{revision}",
        data=str(text),
        out=str(tmp_path / "out"),
        steps=1,
        length=32,
        rank=4,
        held_out=0.0,
    )
    assert finetune.run(settings)["steps"] == 1
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["revision"] == (revision.removeprefix("@") or None)
    names = sorted(hub.downloaded())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_the_config_and_the_tokenizer_come_first(hub, tmp_path, text):
    """A wrong setting is found before the weights are downloaded."""
    settings = finetune.Settings(
        model="org/tiny", data=str(text), out=str(tmp_path / "out"), length=4096
    )
    with pytest.raises(finetune.SettingsError, match="--length must be at most 128, the model's"):
        finetune.run(settings)
    assert "model.safetensors" not in hub.downloaded()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/other", "--model org/other is neither a directory here nor a model on the hub"),
        ("org/tiny@v2", "--model org/tiny has no revision 'v2' on the hub"),
    ],
)
def test_what_the_hub_has_not_is_named(hub, name, message):
    with pytest.raises(finetune.SettingsError, match=message) as error:
        HubModel.parse(name).description()
    assert "\n" not in str(error.value)


def test_a_hub_that_is_not_there_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        finetune.SettingsError, match="--model org/tiny cannot be downloaded: "
    ) as e:
        HubModel.parse("org/tiny").description()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text", ["name", "/org/name", "org/name/more", "./org", "org/", "org/name@", "org/name@a b"]
)
def test_what_is_no_name(text, tmp_path):
    assert HubModel.parse(text) is None
    settings = finetune.Settings(model=text, data="x", out=str(tmp_path / "out"))
    with pytest.raises(finetune.SettingsError, match="there is no directory .* are org/name"):
        finetune.run(settings)


def test_importing_needs_no_optional_package():
    code = """
import sys
import q4jax.finetune, q4jax.cli
names = ("huggingface_hub", "jinja2", "grain", "tokenizers", "tensorboardX", "matplotlib")
print([name for name in names if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
