"""Two processes of four devices; one is killed; the run goes on elsewhere with the same losses."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

import q4jax
from tests.sharding.on_eight_devices.test_training import STEPS, make, train

ROOT = Path(__file__).parents[3]


def start(devices, **settings):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sharding.worker", json.dumps(settings)],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0):
    """What the process printed, as one dict; losses by step under "losses"."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == status, err[-4000:]
    return read(out)


def read(out):
    found = {"losses": {}}
    for line in filter(lambda line: line.startswith("{"), out.splitlines()):
        values = json.loads(line)
        if "step" in values:
            found["losses"][values["step"]] = values["loss"]
        else:
            found |= values
    return found


def test_a_killed_process_and_other_meshes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = {"folder": str(tmp_path / "run"), "address": address}
    together = {"count": 2, "mesh": {"fsdp": 4, "tensor": 2}, "steps": STEPS}
    first = start(4, number=0, **together, **common)
    second = start(4, number=1, killed_at=10, **together, **common)
    _, err = second.communicate(timeout=400)
    assert second.returncode == -signal.SIGKILL, err[-4000:]
    # Left alone it waits for the other, or JAX ends it; in either case not in order.
    try:
        first.wait(timeout=5)
    except subprocess.TimeoutExpired:
        first.kill()
    out, err = first.communicate()
    assert first.returncode != 0, err
    killed = read(out)
    assert set(range(10)) <= set(killed["losses"]) and STEPS - 1 not in killed["losses"]

    alone = {"count": 1, "number": 0, **common}
    eight = finish(start(8, mesh={"tensor": 4, "data": 2}, steps=16, **alone))
    assert eight["start"] == 8, "the last checkpoint that both had finished"
    four = finish(start(4, mesh={"fsdp": 4}, steps=STEPS, **alone))
    assert four["start"] == 16

    model, optimizer = make()
    digest = q4jax.fingerprint(model)
    expected, _ = train(model, optimizer)
    for run in (killed, eight, four):
        wanted = [expected[number] for number in run["losses"]]
        np.testing.assert_allclose(list(run["losses"].values()), wanted, rtol=0, atol=1e-4)
    assert eight["fingerprint"] == four["fingerprint"] == digest
