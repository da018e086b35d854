"""Restore the model of a finished run, here or in a second process that proves it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from q4jax import checkpoint
from q4jax.finetune.base import adapt, find_base, quantization
from q4jax.finetune.folder import RunFolder
from q4jax.finetune.placement import Placement, simulate
from q4jax.finetune.settings import Settings, SettingsError
from q4jax.models.decoder.config import LlamaConfig
from q4jax.models.decoder.decoder import Llama
from q4jax.nnx.convert import quantize_model

_SECOND = "import sys; from q4jax.finetune.restore import main; main(*sys.argv[1:])"


def restore(path: str | os.PathLike[str], *, mesh: str | None = None) -> Llama:
    """Return the model of a finished run, with its adapters, from the checkpoint alone.

    The base is read again only where it was in 4 bits before.

    Args:
      path: the folder of the run.
      mesh: the mesh to shard it on, as the setting; None: the default device. On TPUs its axes are
        Explicit: call the model under `jax.set_mesh`.

    Raises:
      SettingsError: there is no run, or it is not finished.
    """
    folder = RunFolder(Path(path))
    found = folder.description()
    settings = Settings.from_json(found["settings"])
    if not folder.checkpoint.is_dir():
        raise SettingsError(
            f"{folder.path} holds a run that is not finished: --resume continues it"
        )
    placement = Placement(mesh, settings.blocksize)
    with placement.active():
        target = _target(found, settings, placement)
        model: Llama = checkpoint.restore(folder.checkpoint, target)
    model.eval()
    return model


def _target(found: dict[str, Any], settings: Settings, placement: Placement) -> Llama:
    """Return a model like that of a run: abstract, but where its files say what is in 4 bits."""
    if found["is_quantized"]:
        base = find_base(settings, placement).load_4bit(settings, placement)
        return placement.place(adapt(base, settings), nnx.LoRAParam)
    dtypes: dict[str, Any] = {n: jnp.dtype(found[n]) for n in ("dtype", "param_dtype")}

    def fresh() -> Llama:
        dense = Llama(LlamaConfig.from_hf(found["config"]), rngs=nnx.Rngs(0), **dtypes)
        return adapt(quantize_model(dense, quantization(settings)), settings)

    abstract: Llama = nnx.eval_shape(fresh)
    return placement.place(abstract)


def restored_elsewhere(
    path: Path, model: Llama, tokens: np.ndarray, mesh: str | None
) -> dict[str, Any]:
    """Restore a run in a second process, and compare the logits bit by bit.

    Args:
      path: the folder of the run.
      model: its model.
      tokens: int32 `[B, T]`, its input.
      mesh: that of the run.

    Returns:
      `restored_bit_identical`, and the `second_process_pid`.
    """
    with tempfile.TemporaryDirectory() as folder:
        probe = os.path.join(folder, "probe.npz")
        arrays: dict[str, Any] = {"tokens": tokens, **logits(model, tokens)}
        np.savez(probe, **arrays)
        command = [sys.executable, "-c", _SECOND, str(path), probe, *([mesh] if mesh else [])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found: dict[str, Any] = json.loads(done.stdout)
    return found


def logits(model: Llama, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the logits' bits as integers, and their dtype: NumPy's files know no bfloat16."""
    model.eval()
    found = np.asarray(nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(tokens)))
    return {"bits": found.view(f"u{found.itemsize}"), "dtype": np.array(found.dtype.name)}


def main(path: str, probe: str, mesh: str | None = None) -> None:
    """Restore a run, compare its logits with those of a file, and print the result as JSON."""
    simulate(mesh)
    model = restore(path, mesh=mesh)
    with np.load(probe) as expected, Placement(mesh).active():
        found = logits(model, expected["tokens"])
        same = all(np.array_equal(value, expected[name]) for name, value in found.items())
    print(json.dumps({"restored_bit_identical": same, "second_process_pid": os.getpid()}))
