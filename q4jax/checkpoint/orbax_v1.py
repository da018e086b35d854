"""Checkpoints by Orbax's v1 API (`orbax.checkpoint.experimental.v1`).

The same two items, under the same names; `restore` reads what either API wrote.
"""

import contextlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
from orbax.checkpoint.experimental import v1 as ocp

from q4jax.checkpoint.entries import one_line
from q4jax.checkpoint.orbax import ARRAYS, HEADER, read_sized
from q4jax.checkpoint.replacement import read_unmixed, resolve
from q4jax.checkpoint.tree_io import ArrayTargets, rebuild, take_apart

_TEXT = "header"


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


def restore(
    path: str | epath.PathLike, target: Any = None, *, verify: bool = True, partial: bool = False
) -> Any:
    """Restore a checkpoint that `save_checkpointables` or `checkpoint.save` wrote.

    Raises:
      FileNotFoundError: there is no complete checkpoint at `path`.
      ValueError: as `checkpoint.restore`.
    """

    def read(current: epath.Path) -> Any:
        def load(wanted: dict[str, Any]) -> dict[str, Any]:
            return ocp.load_checkpointables(current, wanted)

        return _restore(_Source(load, str(current), current), target, verify, partial)

    return read_unmixed(resolve(path), read)


def restore_step(
    checkpointer: ocp.training.Checkpointer,
    step: int | None = None,
    target: Any = None,
    *,
    verify: bool = True,
    partial: bool = False,
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

    def load(wanted: dict[str, Any]) -> dict[str, Any]:
        loaded: dict[str, Any] = checkpointer.load_checkpointables(step, wanted)
        return loaded

    folder = epath.Path(checkpointer.directory) / str(step)
    source = _Source(load, f"step {step} of {checkpointer.directory}", folder)
    return _restore(source, target, verify, partial)


class _Source(NamedTuple):
    """Where a checkpoint is read from: by a function, with its name for errors and its folder."""

    load: Callable[[dict[str, Any]], dict[str, Any]]
    where: str
    folder: epath.Path


def _restore(source: _Source, target: Any, verify: bool, partial: bool) -> Any:
    def read_arrays(targets: ArrayTargets) -> dict[str, Any]:
        def load() -> dict[str, Any]:
            with _partial() if partial else contextlib.nullcontext():
                arrays: dict[str, Any] = source.load({ARRAYS: targets})[ARRAYS]
            return arrays

        return read_sized(source.folder / ARRAYS, targets, load)

    try:
        signed = source.load({HEADER: None})[HEADER]
        if isinstance(signed, dict) and signed.keys() == {_TEXT}:
            signed = json.loads(signed[_TEXT])
    except (KeyError, FileNotFoundError) as error:
        # Orbax raises KeyError for an item that it cannot read, too.
        if (source.folder / HEADER).exists():
            raise ValueError(
                f"{source.where} is corrupted or incomplete: {one_line(error)}"
            ) from None
        raise ValueError(
            f"{source.where} is not a checkpoint of q4jax: no item {HEADER!r}"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{source.where} is corrupted or incomplete: {one_line(error)}") from None
    return rebuild(signed, read_arrays, source.where, target, verify, partial)


def _partial() -> ocp.Context:
    loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
    return ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading))
