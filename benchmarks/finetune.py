"""Speed of fine-tuning SmolLM2-135M on short documents: packed rows against padded ones.

    python benchmarks/finetune.py        # prints the table
    python benchmarks/finetune.py --against c25ac23   # the step of that commit's example

A figure is the number of learned tokens a second, divided by that of the first line, measured in
the same run: the candidates take turns, so that a slow moment of the machine falls on all of them.
The first line is the loop that one writes first: a document in each row, padded to the same length,
and every activation computed again in the backward pass.
"""

import argparse
import pathlib
import statistics
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import runs
from finetune_against import compare

import q4jax
from q4jax import finetune
from q4jax.finetune.base import adapt
from q4jax.finetune.placement import Placement

LENGTH, ROWS = 128, 4
PLACE = Placement(None)


def documents(count):
    """Documents as short as instructions and answers are: half of a row long, most shorter."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(3.9, 0.6, count).astype(int), 8, LENGTH + 1)
    tokens = [rng.integers(0, 49152, size, dtype=np.int32) for size in sizes]
    return [finetune.Tokens(ids, np.ones(ids.size, bool)) for ids in tokens]


def padded(found):
    """Rows of one document each."""
    parts = [finetune.pack([document], LENGTH) for document in found]
    names = ("inputs", "targets", "weights", "segments")
    return finetune.Rows(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


class Candidate:
    """A model that trains on rows, and the times of its steps."""

    def __init__(self, base, rows, no_remat):
        settings = finetune.Settings(model=None, no_remat=no_remat, batch=ROWS, length=LENGTH)
        self.model = adapt(base, settings)
        self.optimizer = finetune.make_optimizer(self.model, settings)
        self.batches = finetune.Batches(rows, ROWS, 1, seed=0)
        self.speeds = []

    def step(self, number):
        arrays = self.batches.step(number)
        batch = PLACE.batch(arrays, rows=1)
        began = time.perf_counter()
        float(finetune.train_step(self.model, self.optimizer, batch, placement=PLACE).loss)
        if number > 1:  # the first one compiles
            self.speeds.append(arrays["weights"].sum() / (time.perf_counter() - began))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--against", metavar="COMMIT", help="compare with an earlier commit's step")
    options = parser.parse_args()
    if options.against is not None:
        compare(options.against, options.steps)
        return
    steps = options.steps
    base = runs.load_model(None, q4jax.QuantConfig())
    found = documents(400)
    one_each, packed = padded(found), finetune.pack(found, LENGTH)
    candidates = {
        "padded, activations computed again": Candidate(base, one_each, False),
        "packed, activations computed again": Candidate(base, packed, False),
        "packed, activations stored (--no-remat)": Candidate(base, packed, True),
    }
    for number in range(1, steps + 2):
        for candidate in candidates.values():
            candidate.step(number)
    speeds = {name: statistics.median(c.speeds) for name, c in candidates.items()}
    first = next(iter(speeds.values()))
    print(f"padding: {one_each.padding:.0%} of padded rows, {packed.padding:.1%} of packed ones")
    for name, speed in speeds.items():
        print(f"{name:<42} {speed / first:5.2f} x  ({speed:,.0f} learned tokens/s)")


if __name__ == "__main__":
    main()
