"""A training process: trains on a mesh of all devices, saves every few steps, prints its losses.

Arguments as JSON: address, count and number of the processes (count 1: alone), mesh, steps, folder,
and the step at which the process kills itself.
"""

import json
import os
import signal
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh

SAVE_EVERY = 4


def main(settings: dict[str, Any]) -> None:
    """The process."""
    if settings["count"] > 1:
        jax.distributed.initialize(
            settings["address"], settings["count"], settings["number"], initialization_timeout=120
        )
    # After that, as they compute when they are imported.
    import q4jax
    from q4jax import checkpoint
    from tests.sharding.on_eight_devices.test_training import TOKENS, make, place, rules_of, step

    sizes = settings["mesh"]
    devices = np.array(jax.devices()).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    model, optimizer = make(mesh)
    rules = rules_of(mesh)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    with ocp.CheckpointManager(settings["folder"], options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            target = {"model": model, "optimizer": optimizer}
            tree = checkpoint.restore_step(manager, start, target)
            model, optimizer = tree["model"], tree["optimizer"]
        print(json.dumps({"start": start}), flush=True)
        for number in range(start, settings["steps"]):
            if number == settings.get("killed_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            batch = place(TOKENS[number % len(TOKENS)], mesh)
            loss = float(step(model, optimizer, batch, rules=rules))
            print(json.dumps({"step": number, "loss": loss}), flush=True)
            if (number + 1) % SAVE_EVERY == 0:
                tree = {"model": model, "optimizer": optimizer}
                manager.save(number + 1, args=checkpoint.save_args(tree))
        manager.wait_until_finished()
    print(json.dumps({"fingerprint": q4jax.fingerprint(model)}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
