"""The command line: conversions between all formats, and exit codes."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax import checkpoint
from q4jax.cli.main import main
from q4jax.interop import huggingface, peft
from q4jax.models import Llama, LlamaConfig
from tests.support.vectors import GOLDEN

LLAMA = GOLDEN / "llama_tiny_bnb4"


def run(capsys, *arguments):
    """Run a command; return (exit code, printed text)."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out + err


def test_there_and_back_is_the_same_file(tmp_path, capsys):
    (tmp_path / "llama").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(LLAMA / name, tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    steps = [("llama", "orbax"), ("orbax", "huggingface"), ("huggingface", "bitsandbytes")]
    for source, target in steps:
        code, out = run(capsys, "convert", tmp_path / source, tmp_path / target, "--to", target)
        assert (code, out) == (0, f"{tmp_path / target}: {target}, 21 tensors\n")
    original = (LLAMA / "model.safetensors").read_bytes()
    assert (tmp_path / "huggingface" / "model.safetensors").read_bytes() == original
    assert (tmp_path / "bitsandbytes").read_bytes() == original
    digest = q4jax.fingerprint(huggingface.load_directory(LLAMA))
    for form in ("llama", "orbax", "huggingface", "bitsandbytes"):
        code, out = run(capsys, "verify", tmp_path / form, "--fingerprint", digest)
        assert code == 0
        assert out.endswith(f"21 tensors, fingerprint {digest}\n")
        code, out = run(capsys, "inspect", tmp_path / form)
        lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
        name = "model.layers.1.mlp.up_proj.weight"
        assert lines[name][:2] == ["nf4_b64_n256_float32_256x128", "256x128"]
        assert lines["model.norm.weight"] == ["float32", "128", "512", "B"]
    code, out = run(capsys, "verify", LLAMA, "--fingerprint", "0" * 64)
    assert (code, f"has fingerprint {digest}, not 000" in out) == (1, True)
    again = tmp_path / "again"
    config = ["--config", LLAMA / "config.json"]
    convert = ["convert", tmp_path / "bitsandbytes", again, "--to", "huggingface"]
    code, out = run(capsys, *convert)
    assert (code, "the source has no config.json" in out) == (1, True)
    assert run(capsys, *convert, *config)[0] == 0
    assert q4jax.fingerprint(huggingface.load_directory(again)) == digest


def test_full_precision_is_quantized(tmp_path, capsys):
    rng = np.random.default_rng(0)
    tree = {f"{n}.weight": rng.normal(size=(64, 128)).astype("f4") for n in ("up", "lm_head", "x")}
    huggingface.save_directory(tree, tmp_path / "full", {"model_type": "own"})
    settings = ["--quantize", "fp4", "--blocksize", "128", "--plain", "--skip", "x"]
    settings += ["--modules", ".*"]
    arguments = ["convert", tmp_path / "full", tmp_path / "out", "--to", "orbax", *settings]
    assert run(capsys, *arguments)[0] == 0
    weights = checkpoint.restore(tmp_path / "out")["weights"]
    expected = q4jax.Params4bit.quantize(jnp.asarray(tree["up.weight"]), 128, False, "fp4")
    assert q4jax.fingerprint({"w": weights["up.weight"]}) == q4jax.fingerprint({"w": expected})
    for name in ("lm_head.weight", "x.weight"):
        np.testing.assert_array_equal(weights[name], tree[name])
    head = [*arguments[:2], tmp_path / "head", *arguments[3:], "--quantize-head"]
    assert run(capsys, *head)[0] == 0
    weights = checkpoint.restore(tmp_path / "head")["weights"]
    assert weights["lm_head.weight"].quant_state.quant_type == "fp4"
    code, out = run(capsys, *head, "--skip", "layers.9")
    assert (code, "skip has 'layers.9', which no module matches" in out) == (1, True)
    code, out = run(capsys, *head, "--modules", "nope")
    assert (code, "--modules 'nope' matches the whole path of no module" in out) == (2, True)
    code, out = run(capsys, *arguments)
    assert (code, f"{tmp_path / 'out'} exists already" in out) == (3, True)
    code, out = run(capsys, "convert", tmp_path / "out", tmp_path / "o", "--to", "orbax", *settings)
    assert (code, "only Hugging Face directories are quantized" in out) == (1, True)


def test_adapters_are_listed(tmp_path, capsys):
    model = nnx.Dict(q=q4jax.LinearNF4(64, 32, rngs=nnx.Rngs(0)))
    peft.save_adapters(q4jax.add_lora(model, 4, 8.0), tmp_path / "a")
    code, out = run(capsys, "inspect", tmp_path / "a")
    assert (code, out.split()[4:7]) == (0, ["model.q.lora_A", "float32", "4x64"])
    assert run(capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "orbax")[0] == 4


def damage(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def other_method(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (damage, 1, "has a malformed header: its tensors end at byte"),
        (other_method, 4, "quant_method='gptq'"),
        (lambda folder: (folder / "model.safetensors").unlink(), 3, "has neither"),
        (
            lambda folder: (folder / "config.json").unlink(),
            4,
            "is not a checkpoint that q4jax knows",
        ),
        (shutil.rmtree, 3, "there is nothing at"),
    ],
)
def test_exit_codes(tmp_path, capsys, command, change, code, message):
    shutil.copytree(LLAMA, tmp_path / "m")
    change(tmp_path / "m")
    found, out = run(capsys, command, tmp_path / "m")
    assert (found, message in out) == (code, True), out


def test_a_flipped_bit_is_named(tmp_path, capsys):
    codes = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    state = q4jax.Params4bit.quantize(jnp.ones((64, 128))).quant_state
    checkpoint.save(tmp_path / "c", {"w": q4jax.Params4bit(jnp.asarray(codes), state)})
    assert run(capsys, "verify", tmp_path / "c")[0] == 0
    start = codes.tobytes()[:32]
    (file,) = (p for p in (tmp_path / "c").rglob("*") if p.is_file() and start in p.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.find(start) + 5] ^= 16
    file.write_bytes(data)
    code, out = run(capsys, "verify", tmp_path / "c")
    assert code == 1
    assert "c is corrupted: w.packed, uint8[64, 64]" in out


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    from q4jax.interop import bitsandbytes

    bitsandbytes.save_file({"a\x1b[2J": jnp.ones(1)}, tmp_path / "x")
    code, out = run(capsys, "inspect", tmp_path / "x")
    assert (code, "\x1b" in out) == (0, False)


@pytest.mark.slow
def test_the_module_runs():
    command = [sys.executable, "-m", "q4jax", "inspect", str(LLAMA)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("21 tensors")
    assert subprocess.run([*command[:3], "dance"], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(
    ("leaf", "kind"), [(jax.random.key(0), r"key<fry>"), (3, "int"), ("text", "str")]
)
@pytest.mark.parametrize("target", ["bitsandbytes", "huggingface"])
def test_what_a_format_does_not_hold_is_one_line(tmp_path, capsys, leaf, kind, target):
    checkpoint.save(tmp_path / "c", {"x": jnp.ones(3), "other": leaf})
    code, text = run(capsys, "convert", tmp_path / "c", tmp_path / "out", "--to", target)
    assert code == 4
    assert text.startswith(f"q4jax: other is of type {kind}, which {target} files do not hold")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_model_says_how_to_convert_it(tmp_path, capsys):
    config = LlamaConfig(64, 64, 64, 2, 2, 2, 32)
    model = q4jax.quantize_model(Llama(config, rngs=nnx.Rngs(0)), blocksize=32)
    model = q4jax.add_lora(model, 2, 2)
    checkpoint.save(tmp_path / "run", {"model": model})
    for target in ("huggingface", "bitsandbytes"):
        convert = ["convert", tmp_path / "run", tmp_path / "new", "--to", target]
        code, out = run(capsys, *convert)
        assert code == 1
        assert "has no config.json" in out and out.count("\n") == 1
        assert "pass --config and, for its adapters, --alpha" in out
        assert not (tmp_path / "new").exists()
