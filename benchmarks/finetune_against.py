"""The training step of an earlier commit's `examples/finetune.py` beside that of `q4jax.finetune`.

Each candidate runs in a process of its own, on the library of its commit, and waits while another
one computes: they take turns on the same windows of a text, so that a slow moment falls on all.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile

import demo
import numpy as np
import runs

ROOT = pathlib.Path(__file__).parents[1]
ROWS, LENGTH = 4, 128
SETTINGS = {"rank": 8, "alpha": 16.0, "seed": 0, "steps": 100, "learning_rate": 1e-3}

_TURNS = """
import json, sys, time
import numpy as np
for line in sys.stdin:
    tokens = np.load(line.strip())
    began = time.perf_counter(), time.process_time()
    loss = float(step(tokens))
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    print(json.dumps([loss, *seconds]), flush=True)
"""

_EARLIER = """
import finetune, q4jax, runs
from meshes import RunSharding
settings = %(settings)r
dense = runs.load_model(None)
model, optimizer = finetune.adapt(q4jax.quantize_model(dense, q4jax.QuantConfig()), settings)
place = RunSharding(None, 64)
def step(tokens):
    return finetune.train_step(model, optimizer, place.batch(tokens), sharding=place)
"""

_NOW = """
import runs
import numpy as np
import q4jax
from q4jax import finetune
from q4jax.finetune.base import adapt
from q4jax.finetune.placement import Placement
settings = finetune.Settings(model=None, **%(settings)r)
model = adapt(runs.load_model(None, q4jax.QuantConfig()), settings)
model.remat = %(remat)r
optimizer, place = finetune.make_optimizer(model, settings), Placement(None)
def step(tokens):
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    arrays["weights"] = np.ones(arrays["inputs"].shape, np.float32)
    batch = place.batch({name: array[None] for name, array in arrays.items()}, rows=1)
    return finetune.train_step(model, optimizer, batch, placement=place).loss
"""


class Candidate:
    """A process that does a step of training for each file of tokens that it is told."""

    def __init__(self, tree, code):
        command = [sys.executable, "-c", code + _TURNS]
        path = f"{tree}:{tree / 'examples'}"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(command, env=environment, cwd=tree, **pipes)
        self.seconds, self.cpu, self.losses = [], [], []

    def step(self, file):
        """Do a step; the first one compiles and is not counted."""
        print(file, file=self._process.stdin, flush=True)
        loss, seconds, cpu = json.loads(self._process.stdout.readline())
        if self.losses:
            self.seconds.append(seconds)
            self.cpu.append(cpu)
        self.losses.append(loss)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def checkout(commit, folder):
    """Write the files of a commit into a folder, with the native library of this checkout.

    The library's sources must be the same in both.
    """
    archive = folder / "tree.tar"
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "archive", "-o", str(archive), commit], check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source = "q4jax/native/src"
    changed = subprocess.run([*git, "diff", "--quiet", commit, "--", source], check=False)
    if changed.returncode:
        raise SystemExit(f"{source} is another one in {commit}: its library is not this one")
    for library in (ROOT / "q4jax" / "native").glob("*.so"):
        shutil.copy(library, folder / "q4jax" / "native")


def compare(commit, steps):
    """Print the speed of each candidate, divided by that of the earlier commit."""
    tokens = np.array(runs.load_tokenizer(None).encode(demo.texts()[0][:2_000_000]).ids, np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        checkout(commit, folder)
        known = {"settings": SETTINGS}
        candidates = {
            f"{commit}, examples/finetune.py": Candidate(folder, _EARLIER % known),
            "now, as by default": Candidate(ROOT, _NOW % {**known, "remat": "layer"}),
            "now, model.remat = 'projections'": Candidate(
                ROOT, _NOW % {**known, "remat": "projections"}
            ),
            "now, --no-remat": Candidate(ROOT, _NOW % {**known, "remat": None}),
        }
        rng = np.random.default_rng(0)
        for number in range(steps + 1):
            starts = rng.integers(0, tokens.size - LENGTH, ROWS)
            np.save(folder / "tokens.npy", tokens[starts[:, None] + np.arange(LENGTH + 1)])
            for candidate in candidates.values():
                candidate.step(folder / "tokens.npy")
            print(number, {n: c.losses[-1] for n, c in candidates.items()}, file=sys.stderr)
        for candidate in candidates.values():
            candidate.close()
    first, *_ = candidates.values()
    for name, candidate in candidates.items():
        np.testing.assert_allclose(candidate.losses[0], first.losses[0], rtol=1e-4)
        wall = [a / b for a, b in zip(first.seconds, candidate.seconds, strict=True)]
        cpu = [a / b for a, b in zip(first.cpu, candidate.cpu, strict=True)]
        print(
            f"{name:<40} {statistics.median(wall):5.2f} x the tokens/s, "
            f"{statistics.median(cpu):5.2f} x a CPU second  "
            f"({ROWS * LENGTH / statistics.median(candidate.seconds):,.0f} tokens/s)"
        )
