"""Runs tests/sharding/on_eight_devices in a process that has eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "on_eight_devices"
SHARES = {"test_explicit_models.py": 2}  # of which one test in so many runs, by the run's seed

FILES = [
    pytest.param(path.name, marks=() if path.stem == "test_weights" else pytest.mark.heavy)
    for path in sorted(FOLDER.glob("test_*.py"))
]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file, sampling):
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", FOLDER / file]
    command += [*sampling, "--share", SHARES.get(file, 1)]
    run = subprocess.run(
        [*map(str, command)],
        env=os.environ | {"XLA_FLAGS": flags, "Q4JAX_TEST_DEVICES": "8"},
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[2],
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
