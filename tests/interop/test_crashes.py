"""A full disk or a kill at every moment of every writer: the old state or the new one is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.cli.main import main
from q4jax.interop import bitsandbytes, huggingface, peft
from q4jax.models import Llama, LlamaConfig, save_pretrained
from tests.support.disk_faults import DiskFaults, moments

CONFIG = {"model_type": "own"}
COUNT = 48
TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
)


def tree(version):
    """Tensors of more bytes than a file buffers, so that each is a write of its own."""
    weight = q4jax.Params4bit.quantize(jnp.full((64, 512), float(version)))
    dense = {f"{n}.bias": np.full(4096, version, np.float32) for n in range(COUNT)}
    return {"up.weight": weight, **dense}


def version_of(found):
    (version,) = {float(v) for n, a in found.items() if n.endswith("bias") for v in np.unique(a)}
    assert len(found) == 1 + COUNT
    assert (found["up.weight"].dequantize() == version).all()
    return version


class File:
    """`save_file` and `load_file`: an existing file is replaced."""

    replaces = True

    def prepare(self, folder, version):
        return tree(version)

    def write(self, content, path):
        bitsandbytes.save_file(content, path)

    def read(self, path):
        return version_of(bitsandbytes.load_file(path))


class Directory(File):
    """`save_directory`, in shards and with another file."""

    replaces = False

    def write(self, content, path):
        files = {"tokenizer.json": b"{}"}
        huggingface.save_directory(content, path, CONFIG, max_shard_bytes=80_000, files=files)

    def read(self, path):
        found = version_of(huggingface.load_directory(path))
        assert (path / "tokenizer.json").read_text() == "{}"
        return found


class Pretrained(Directory):
    def prepare(self, folder, version):
        model = Llama(TINY, rngs=nnx.Rngs(0))
        model.norm.scale[...] = jnp.full_like(model.norm.scale[...], version)
        return q4jax.quantize_model(model)

    def write(self, content, path):
        save_pretrained(content, path, max_shard_bytes=3000)

    def read(self, path):
        found = huggingface.load_directory(path)
        assert len(found) == 3 + 9 * TINY.num_hidden_layers
        return float(found["model.norm.weight"][0])


class Adapters(Directory):
    def prepare(self, folder, version):
        parts = {f"q{n}": nnx.Linear(64, 64, rngs=nnx.Rngs(0)) for n in range(24)}
        model = q4jax.quantize_model(nnx.Dict(**parts))
        model = q4jax.add_lora(model, rank=40, alpha=8, targets=r".*q\d+")
        for n in range(24):
            model[f"q{n}"].lora_b[...] += version
        return model

    def write(self, content, path):
        peft.save_adapters(content, path)

    def read(self, path):
        _, pairs = peft.read_adapters(path)
        assert len(pairs) == 24
        (version,) = {float(v) for _, b in pairs.values() for v in np.unique(b)}
        return version


class Converted(Directory):
    """`convert` to a directory, with a tokenizer."""

    to = "huggingface"

    def prepare(self, folder, version):
        source = folder.parent / f"{folder.name}-source-{version}"
        files = {"tokenizer.json": b"{}"}
        huggingface.save_directory(tree(version), source, CONFIG, files=files)
        return source

    def write(self, content, path):
        from q4jax.cli import formats

        formats.write(formats.load(str(content)), str(path), self.to, "uint8")


class ConvertedFile(Converted):
    to = "bitsandbytes"

    def read(self, path):
        return File.read(self, path)


class Beside(Directory):
    """`save_directory` into a directory that holds other files, which cannot be replaced."""

    def begin(self, path):
        path.mkdir()
        (path / "notes.txt").write_text("kept")


WRITERS = [File, Directory, Pretrained, Adapters, Converted, ConvertedFile, Beside]
# The others take longer.
CORE = [(File, "kill"), (Directory, "kill"), (Directory, "full"), (Converted, "kill")]


@pytest.mark.parametrize(
    ("writer", "how"),
    [
        pytest.param(writer, how, marks=() if (writer, how) in CORE else pytest.mark.heavy)
        for writer in WRITERS
        for how in ("kill", "full")
    ],
)
def test_every_moment_of_every_writer(tmp_path, capsys, writer, how):
    writer, path = writer(), tmp_path / "there" / "x"
    path.parent.mkdir()
    contents = {version: writer.prepare(tmp_path / "x", version) for version in (1, 2, 3)}
    old = 1 if writer.replaces else None

    def state():
        """The version at the path; `verify` says the same."""
        code = main(["verify", str(path)])
        try:
            found = writer.read(path)
        except FileNotFoundError:
            assert code in (3, 4)
            return None
        assert code == 0
        return found

    def forget():
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    with DiskFaults():
        if writer.replaces:
            writer.write(contents[1], tmp_path / "one")
    seen = []
    for faults in moments(how):
        if writer.replaces:
            shutil.copy(tmp_path / "one", path)
        if isinstance(writer, Beside):
            writer.begin(path)
        with faults:
            writer.write(contents[2], path)
        seen.append(state())
        assert seen[-1] in (old, 2)
        if seen[-1] == 2 and not writer.replaces:
            with pytest.raises(FileExistsError, match="exists already"):
                writer.write(contents[3], path)
            forget()
        with DiskFaults():
            writer.write(contents[3], path)
        assert writer.read(path) == 3
        assert os.listdir(path.parent) == ["x"]
        if path.is_dir():
            assert not [name for name in os.listdir(path) if name.startswith(".")]
        forget()
    assert len(seen) >= 50
    assert (seen[0], seen[-1]) == (old, 2)
    capsys.readouterr()


KILLED = """
import itertools, os, random, signal, sys, time
import numpy as np
import q4jax
from q4jax.interop import bitsandbytes, huggingface
from pathlib import Path

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
SPEC = q4jax.QuantSpec("nf4", 64, 0, "float32", (512, 512))

def tree(version):
    state = q4jax.QuantState(np.full((512, 8), version, "f4"), None, None, SPEC)
    codes = np.full((512, 256), version % 256, np.uint8)
    return {"w": q4jax.Params4bit(codes, state), "b": np.full(9000, version, "f4")}

def check(found):
    version = int(found["b"][0])
    expected = tree(version)
    assert np.asarray(found["b"]).tobytes() == expected["b"].tobytes()
    assert np.asarray(found["w"].packed).tobytes() == expected["w"].packed.tobytes()
    return version

def work(begin, pipe):
    for version in itertools.count(begin):
        os.write(pipe, b"%d " % version)
        bitsandbytes.save_file(tree(version), folder / "file")
        huggingface.save_directory(tree(version), folder / f"d{version}", {}, max_shard_bytes=1)

def inspect(version):
    found = check(bitsandbytes.load_file(folder / "file")) if (folder / "file").exists() else -1
    assert found in (version - 1, version), (found, version)
    for number in {max(version - 1, 0), version}:
        there = folder / f"d{number}"
        assert there.exists() or number == version
        if there.exists():
            assert check(huggingface.load_directory(there)) == number
            assert len(list(there.iterdir())) == 4
    try:
        huggingface.save_directory(tree(version), folder / f"d{version}", {}, max_shard_bytes=1)
    except FileExistsError as error:
        assert "exists already" in str(error)  # the kill came after the last rename
    bitsandbytes.save_file(tree(version), folder / "file")
    left = [str(p) for p in folder.rglob(".*") for p in (p, *p.iterdir())]
    assert not left, left

# This process has started no thread: jax starts its own in the children.
def fork(function, *args):
    process = os.fork()
    if process == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
    return process

rng, version = random.Random(1), 0
for kill in range(kills):
    reader, writer = os.pipe()
    process = fork(work, version, writer)
    os.close(writer)
    begun = os.read(reader, 20)
    time.sleep(rng.uniform(0, 0.2))
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    while block := os.read(reader, 65536):
        begun += block
    os.close(reader)
    version = int(begun.split()[-1])
    assert os.waitpid(fork(inspect, version), 0)[1] == 0
    version += 1
print(version)
"""


TWO = """
def save(number, path, pipe):
    os.read(pipe, 1)  # until the parent has closed its end
    try:
        huggingface.save_directory(tree(number), path, {}, max_shard_bytes=1)
    except FileExistsError as error:
        assert str(path) in str(error)
        os._exit(1)

def inspect(path, winner):
    assert check(huggingface.load_directory(path)) == winner
    assert not list(folder.glob(".*"))

for number in range(kills):
    path = folder / str(number)
    reader, writer = os.pipe()
    pair = []
    for version in (1, 2):
        pair.append(os.fork())
        if not pair[-1]:
            os.close(writer)
            save(version, path, reader)
            os._exit(0)
    os.close(writer)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in pair]
    os.close(reader)
    assert sorted(codes) == [0, 1], codes
    assert os.waitpid(fork(inspect, path, 1 + codes.index(0)), 0)[1] == 0
print(kills)
"""


@pytest.mark.heavy
def test_one_of_two_processes_wins(tmp_path):
    common, _, _ = KILLED.partition("rng, version")
    assert int(run(common + TWO, tmp_path, 30)) == 30


@pytest.mark.heavy
def test_kills_at_random_moments(tmp_path, request):
    kills = max(60, request.config.getoption("--kills"))
    assert int(run(KILLED, tmp_path, kills)) > kills


def run(code, *args):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(q4jax.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
