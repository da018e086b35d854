"""Checkpoints by Orbax's v1 API (`orbax.checkpoint.experimental.v1`).

The same two items, under the same names; `restore` reads what either API wrote.
"""

import json
from collections.abc import Callable
from typing import Any

from etils import epath
from orbax.checkpoint.experimental import v1 as ocp

from q4jax.checkpoint.orbax import ARRAYS, HEADER
from q4jax.checkpoint.tree_io import ArrayTargets, rebuild, take_apart

_TEXT = "header"

_Read = Callable[[dict[str, Any]], dict[str, Any]]


def checkpointables(tree: Any) -> dict[str, Any]:
    """Return the argument of `save_checkpointables`, of a `training.Checkpointer` or of the module.

    Arguments and errors are those of `checkpoint.save`. The sha256 of every array is computed here,
    before an asynchronous save starts.

    Examples:
      >>> import tempfile, jax.numpy as jnp, q4jax
      >>> from orbax.checkpoint.experimental import v1 as ocp
      >>> from q4jax import checkpoint_v1
      >>> state = {"w": q4jax.Params4bit.quantize(jnp.ones((2, 64))), "step": 3}
      >>> with ocp.training.Checkpointer(tempfile.mkdtemp()) as checkpointer:
      ...     _ = checkpointer.save_checkpointables(3, checkpoint_v1.checkpointables(state))
      ...     checkpoint_v1.restore_step(checkpointer)
      {'step': 3, 'w': Params4bit(uint8[2, 32], fp4_b64_n0_float32_2x64)}
    """
    arrays, signed = take_apart(tree)
    return {ARRAYS: arrays, HEADER: {_TEXT: json.dumps(signed)}}


def restore(path: str | epath.PathLike, target: Any = None, *, verify: bool = True) -> Any:
    """Restore a checkpoint that `save_checkpointables` or `checkpoint.save` wrote.

    Raises:
      FileNotFoundError: there is no complete checkpoint at `path`.
      ValueError: as `checkpoint.restore`.
    """
    where = epath.Path(path).expanduser().absolute()
    if not where.exists():
        raise FileNotFoundError(f"no checkpoint at {where}")

    def read(wanted: dict[str, Any]) -> dict[str, Any]:
        return ocp.load_checkpointables(where, wanted)

    return _restore(read, str(where), target, verify)


def restore_step(
    checkpointer: ocp.training.Checkpointer,
    step: int | None = None,
    target: Any = None,
    *,
    verify: bool = True,
) -> Any:
    """Restore from a `training.Checkpointer`; None takes the latest step.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: as `checkpoint.restore`.
    """
    steps = [metadata.step for metadata in checkpointer.checkpoints]
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no step {step} in {checkpointer.directory}")

    def read(wanted: dict[str, Any]) -> dict[str, Any]:
        loaded: dict[str, Any] = checkpointer.load_checkpointables(step, wanted)
        return loaded

    return _restore(read, f"step {step} of {checkpointer.directory}", target, verify)


def _restore(read: _Read, where: str, target: Any, verify: bool) -> Any:
    def read_arrays(targets: ArrayTargets) -> dict[str, Any]:
        arrays: dict[str, Any] = read({ARRAYS: targets})[ARRAYS]
        return arrays

    try:
        signed = read({HEADER: None})[HEADER]
    except (KeyError, FileNotFoundError):
        raise ValueError(f"{where} is not a checkpoint of q4jax: no item {HEADER!r}") from None
    if isinstance(signed, dict) and signed.keys() == {_TEXT}:
        signed = json.loads(signed[_TEXT])
    return rebuild(signed, read_arrays, where, target, verify)
