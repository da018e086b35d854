"""Every wrong setting is one line that names it, with exit code 2, and nothing is written."""

import dataclasses
import json
import re
import shutil

import pytest

import q4jax
from q4jax import finetune
from q4jax.cli.main import main
from q4jax.finetune.placement import Placement
from q4jax.finetune.settings import CHANGING, flag, located


@pytest.fixture
def run(model, text, tmp_path, capsys):
    """Return a function that runs the command, which must fail; it returns the message."""

    def fails(*options, **replaced):
        values = {"model": model, "data": text, "out": tmp_path / "out", "length": 32} | replaced
        named = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        try:
            code = main(["finetune", *named, *options])
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        assert code == 2
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return captured.err

    return fails


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rank", "0", "--rank must be an integer of at least 1, got 0"),
        ("--steps", "many", "--steps: must be an integer of at least 1, got 'many'"),
        ("--alpha", "nan", "--alpha must be a positive number, got nan"),
        ("--learning-rate", "-1", "--learning-rate must be a positive number, got -1.0"),
        ("--dropout", "1", "--dropout must be a number from 0 to below 1, got 1.0"),
        ("--warmup", "1.5", "--warmup must be a number from 0 to 1, got 1.5"),
        ("--clip", "0", "--clip must be a positive number"),
        ("--schedule", "sine", "--schedule must be one of cosine, linear, constant, got 'sine'"),
        ("--quant-type", "int4", "--quant-type must be one of nf4, fp4, got 'int4'"),
        ("--blocksize", "100", "--blocksize must be one of 32, 64, .*, got 100"),
        ("--dtype", "float64", "--dtype must be one of None, float32, bfloat16, float16, got"),
        ("--accumulate", "3", "--accumulate must be a divisor of --batch 4, got 3"),
        ("--seed", "-1", r"--seed must be an integer from 0 to 2\^32 - 1, got -1"),
        ("--mesh", "fsdp2", "--mesh must be like fsdp=4,tensor=2, got 'fsdp2'"),
        ("--mesh", "model=2", r"--mesh has axes among data, fsdp, tensor, expert, got \['model'\]"),
        ("--mesh", "fsdp=2,fsdp=2", "--mesh names an axis twice"),
        ("--prompt", "", "--prompt must be a text that is not empty"),
        ("--new-tokens", "0", "--new-tokens must be an integer of at least 1, got 0"),
        ("--new-tokens", "126", None),
        ("--targets", "nothing", "the adapters: .*nothing"),
        ("--targets", "(", "the adapters: .*regular expression"),
        ("--length", "5000", "--length must be at most 128, the model's context, got 5000"),
        ("--data", "nowhere.txt", "--data: nowhere.txt: No such file or directory"),
        ("--data", ".", "--data: .: Is a directory"),
        ("--eval-data", "nowhere.txt", "--eval-data: nowhere.txt: No such file"),
        ("--resume", None, "--resume: --out .* holds no run"),
        ("--rang", "3", "unrecognized arguments: --rang 3"),
    ],
)
def test_a_wrong_option_is_one_line(run, option, value, message):
    options = [option] if value is None else [option, value]
    if message is None:
        options += ["--prompt", "The"]
        message = "--prompt has 3 tokens, and --new-tokens is 126: together above 128"
    assert re.search(message, run(*options))


def test_a_wrong_model_is_one_line(run, model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert "--model: " in (err := run(model=broken))
    assert "unheard_of" in err
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").unlink()
    assert "model.safetensors" in run(model=broken)
    (broken / "config.json").unlink()
    assert "there is no file" in run(model=broken)
    assert "are org/name or org/name@revision" in run(model=tmp_path / "nowhere")


@pytest.mark.parametrize("option", ["--quant-type=fp4", "--blocksize=32", "--dense-baseline"])
def test_a_model_in_4_bits_is_not_quantized_otherwise(run, model, tmp_path, option):
    small = q4jax.models.from_pretrained(model, q4jax.QuantConfig())
    q4jax.models.save_pretrained(small, tmp_path / "small", tokenizer=model)
    err = run(option, model=tmp_path / "small")
    assert err == f"q4jax: {option.partition('=')[0]}: --model is in 4 bits already\n"


def test_a_run_has_paths_from_the_root(model, text, monkeypatch):
    monkeypatch.chdir(text.parent)
    settings = finetune.Settings(model=str(model), data=text.name, eval_data=("other.txt",))
    found = located(settings)
    assert found.data == (str(text),)
    assert found.eval_data == (str(text.parent / "other.txt"),)
    monkeypatch.chdir(model.parent)
    assert located(finetune.Settings(model=model.name)).model == str(model)
    assert located(finetune.Settings(model="org/name@v1")).model == "org/name@v1"


def test_messages_without_a_template_are_one_line(run, model, tmp_path, lines):
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "tokenizer_config.json").unlink()
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    err = run(model=plain, data=lines(talk, talk))
    assert re.search(r"line [12]: messages need a chat template, and .* tokenizer has none", err)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 8.0}, "--rank must be an integer of at least 1, got 8.0"),
        ({"rank": True}, "--rank must be an integer of at least 1, got True"),
        ({"rslora": 1}, "--rslora must be true or false, got 1"),
        ({"data": (3,)}, "--data must be paths"),
        ({"targets": ("a", "b")}, "--targets must be a text"),
        ({"alpha": "16"}, "--alpha must be a positive number, got '16'"),
    ],
)
def test_values_of_another_type_are_refused(values, message):
    with pytest.raises(finetune.SettingsError, match=message):
        finetune.Settings(model=None, **values)


def test_settings_are_the_same_after_json():
    settings = finetune.Settings(model="m", data=("a", "b"), dropout=0, mesh="fsdp=2")
    again = finetune.Settings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again == settings
    with pytest.raises(finetune.SettingsError, match=r"unknown settings: \['rang'\]"):
        finetune.Settings.from_json({"model": "m", "rang": 3})


def test_ctrl_c_before_the_first_step_is_no_traceback(model, text, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run", interrupted)
    options = ["--model", str(model), "--data", str(text), "--out", str(tmp_path / "out")]
    assert main(["finetune", *options]) == 130


def test_every_setting_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    names = [field.name for field in dataclasses.fields(finetune.Settings)]
    assert set(CHANGING) < set(names)
    for name in names:
        assert f"{flag(name)} " in text


def test_a_mesh_needs_its_devices():
    with pytest.raises(finetune.SettingsError, match="--mesh fsdp=64 is for 64 devices, there are"):
        Placement("fsdp=64")
