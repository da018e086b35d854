"""Save and restore trees with 4-bit weights by Orbax, verified against a manifest.

Orbax stores arrays and the names of their targets, and casts an array to the dtype that a target
asks for. So a checkpoint has a second item beside the arrays, committed together with them: a
header with the dtype, shape and sha256 of every leaf. A target is compared with it before an array
is read, and every array after.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from q4jax.checkpoint.adapters import adapter_state, with_adapters
from q4jax.checkpoint.entries import one_line
from q4jax.checkpoint.replacement import read_unmixed, replacing, resolve
from q4jax.checkpoint.tree_io import ArrayTarget, ArrayTargets, rebuild, take_apart
from q4jax.tree.check_sharding import check_sharding

__all__ = ["adapter_state", "restore", "restore_step", "save", "save_args", "with_adapters"]

# The two items of a checkpoint.
ARRAYS, HEADER = "arrays", "q4jax"


def save(path: str | epath.PathLike, tree: Any, *, force: bool = False) -> None:
    """Write a checkpoint completely, or not at all.

    Args:
      path: the directory to make; its parents are made too.
      tree: an `nnx.Module`, an `nnx.State`, or any pytree of these, of `Params4bit`, arrays, typed
        PRNG keys and Python scalars (bool, int, float, str). Every leaf is saved, so give the
        whole `nnx.state(model)` and not `nnx.state(model, nnx.Param)`.
      force: replace the checkpoint at `path`, once the new one is complete. Nothing but a
        checkpoint of this kind is replaced.

    Raises:
      FileExistsError: there is something at `path`, and `force` is False or it is no checkpoint.
      ValueError: a 4-bit weight is incomplete, or does not fit its description; two leaves have
        one name; there is no array in the tree.
      TypeError: a leaf of another kind.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, q4jax
      >>> from q4jax import checkpoint
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> weight = q4jax.Params4bit.quantize(jnp.ones((2, 64)), quant_type="nf4")
      >>> checkpoint.save(path, {"w": weight, "scale": jnp.ones(2), "step": 3})
      >>> checkpoint.restore(path)
      {'scale': Array([1., 1.], dtype=float32), 'step': 3,
       'w': Params4bit(uint8[2, 32], nf4_b64_n0_float32_2x64)}
    """
    path = resolve(path)

    def check() -> None:
        if not path.exists():
            return
        ours = (path / HEADER).exists()
        if not (force and ours):
            what = "it" if ours else "checkpoints of q4jax only"
            raise FileExistsError(f"path {path} exists already (force=True replaces {what})")

    with (
        replacing(path, check) as new,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(new, args=save_args(tree))


def restore(
    path: str | epath.PathLike, target: Any = None, *, verify: bool = True, partial: bool = False
) -> Any:
    """Read a checkpoint of `save` or `save_args`, and verify it.

    Args:
      path: its directory. A step of a `CheckpointManager` is one too.
      target: what to restore: a tree like the one saved, with arrays or, as `nnx.eval_shape` and
        `jax.eval_shape` make it, `jax.ShapeDtypeStruct`s. Arrays are placed as those of the target
        are (`sharding`, and `format` where the layout is not the default one), numpy arrays stay
        numpy. It is not changed. None: nested dicts and lists as saved, on the default device,
        with every `Params4bit` rebuilt.
      verify: compare the sha256 of every array with the one it had when it was saved.
      partial: the target may leave out parts of the checkpoint, such as the optimizer; they are not
        read, and each is named in the log ("q4jax", at level INFO).

    Returns:
      The target with the saved values: for a module, a new module of the same graph.

    Raises:
      FileNotFoundError: there is no complete checkpoint at `path`.
      ValueError: `path` is no checkpoint of q4jax; its leaves differ from the target's in name,
        tag, dtype or shape (both sides are named); the target's weights are split so that they
        could not be used (`check_sharding`); the arrays are not those that were saved.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, q4jax
      >>> from q4jax import checkpoint
      >>> path = tempfile.mkdtemp() + "/checkpoint"
      >>> w = jax.random.normal(jax.random.key(0), (2, 64))
      >>> checkpoint.save(path, {"w": q4jax.Params4bit.quantize(w, quant_type="nf4")})
      >>> checkpoint.restore(path, {"w": q4jax.Params4bit.quantize(w, quant_type="fp4")})
      Traceback (most recent call last):
      ValueError: target does not match the checkpoint: w.quant_state.absmax is
      float32[2, 1] fp4_b64_n0_float32_2x64 in target, float32[2, 1] nf4_b64_n0_float32_2x64 in the
      checkpoint
    """
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:

        def read(current: epath.Path) -> Any:
            source = _Source(
                lambda args: checkpointer.restore(current, args=args), str(current), current
            )
            return _restore(source, target, verify, partial)

        return read_unmixed(resolve(path), read)


def save_args(tree: Any) -> ocp.args.Composite:
    """Return the arguments with which an Orbax `CheckpointManager` saves; `restore_step` reads it.

    The arguments, the errors and the content are those of `save`. The sha256 of every array is
    computed here, before an asynchronous save starts.

    Examples:
      >>> import tempfile, jax.numpy as jnp, orbax.checkpoint as ocp, q4jax
      >>> from q4jax import checkpoint
      >>> state = {"w": q4jax.Params4bit.quantize(jnp.ones((2, 64))), "x": jnp.zeros(2)}
      >>> options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
      >>> with ocp.CheckpointManager(tempfile.mkdtemp(), options=options) as manager:
      ...     for step in range(manager.latest_step() or 0, 4):
      ...         state["x"] += 1
      ...         _ = manager.save(step, args=checkpoint.save_args(state))
      ...     manager.wait_until_finished()
      ...     steps, restored = manager.all_steps(), checkpoint.restore_step(manager, target=state)
      >>> steps, restored["x"]
      ([2, 3], Array([4., 4.], dtype=float32))
    """
    arrays, signed = take_apart(tree)
    items = {ARRAYS: ocp.args.PyTreeSave(arrays), HEADER: ocp.args.JsonSave(signed)}
    return ocp.args.Composite(**items)


def restore_step(
    manager: ocp.CheckpointManager,
    step: int | None = None,
    target: Any = None,
    *,
    verify: bool = True,
    partial: bool = False,
) -> Any:
    """Restore from a `CheckpointManager` that saved with `save_args`; None takes the latest step.

    Raises:
      FileNotFoundError: there is no such step.
      ValueError: as `restore`.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise FileNotFoundError(f"no step {step} in {manager.directory}")
    source = _Source(
        lambda args: manager.restore(step, args=args),
        f"step {step} of {manager.directory}",
        epath.Path(manager.directory) / str(step),
    )
    return _restore(source, target, verify, partial)


class _Source(NamedTuple):
    """Where a checkpoint is read from: by a function, with its name for errors and its folder."""

    read: Callable[[ocp.args.Composite], Any]
    where: str
    folder: epath.Path


def _restore(source: _Source, target: Any, verify: bool, partial: bool) -> Any:
    if target is not None:
        check_sharding(target)

    def read_arrays(targets: ArrayTargets) -> dict[str, Any]:
        wanted = {name: _restore_args(target) for name, target in targets.items()}
        request = ocp.args.PyTreeRestore(
            item=dict.fromkeys(wanted, 0), restore_args=wanted, partial_restore=partial
        )
        arguments = ocp.args.Composite(**{ARRAYS: request})
        return read_sized(source.folder / ARRAYS, targets, lambda: source.read(arguments)[ARRAYS])

    return rebuild(_read_header(source), read_arrays, source.where, target, verify, partial)


def _restore_args(wanted: ArrayTarget) -> ocp.RestoreArgs:
    """Return Orbax's arguments for an array, without a dtype, to which Orbax would cast."""
    if isinstance(wanted, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # With the shape, Orbax refuses an array of another one before it allocates it.
    where = wanted.sharding if wanted.format.layout is None else wanted.format
    return ocp.ArrayRestoreArgs(sharding=where, global_shape=wanted.shape)


def read_sized(
    folder: epath.Path, targets: ArrayTargets, read: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Read arrays; ValueError, with a name, if one has another shape in its file than its target.

    Orbax allocates an array that goes to numpy as large as its file says, so these files are looked
    up before. For the others it refuses another shape, but does not name the array.
    """
    in_numpy: ArrayTargets = {n: t for n, t in targets.items() if isinstance(t, np.ndarray)}
    _check_shapes(folder, in_numpy)
    try:
        return read()
    except Exception:  # Orbax raises a plain one
        _check_shapes(folder, targets)
        raise


def _check_shapes(folder: epath.Path, targets: ArrayTargets) -> None:
    if not targets or not folder.exists():
        return
    stored = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    for name, target in targets.items():
        shape = tuple(stored[name].shape)
        if shape != target.shape:
            raise ValueError(f"{name} has shape {shape} in its file, not {target.shape}")


def _read_header(source: _Source) -> Any:
    try:
        return source.read(ocp.args.Composite(**{HEADER: ocp.args.JsonRestore()}))[HEADER]
    except (KeyError, FileNotFoundError):
        raise ValueError(
            f"{source.where} is not a checkpoint of q4jax: no item {HEADER!r}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source.where} is corrupted or incomplete: {one_line(error)}") from None
