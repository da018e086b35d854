"""Checkpoints that are replaced whole: what is at a path is the old one or the new one.

A new checkpoint is written into the private folder of `q4jax.disk.claim`. Once complete and on the
disk, it changes places with the old one by two renames. A process that is killed leaves the folder:

- without `new`: the new checkpoint was not complete;
- with `new`, and the path has the old checkpoint or never had one: as before the save;
- with `new` and `old`, and nothing at the path: between the renames, both complete. Readers take
  `new`, and the next writer finishes the move.

On storage that is not a local file system (`gs://`), one writer at a time is up to the caller.
"""

import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from q4jax.disk.claim import claim, claimed, clear

T = TypeVar("T")

_NEW, _OLD = "new", "old"
# Orbax writes it into each directory, with the time of the save.
_STAMP = "_CHECKPOINT_METADATA"
# A reader that meets a replacement starts again after each of these pauses, in seconds.
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def resolve(path: str | epath.PathLike) -> epath.Path:
    """Return an absolute path; a local one without symbolic links, which stay where they are."""
    found = epath.Path(path).expanduser()
    return epath.Path(os.path.realpath(found)) if _is_local(found) else found.absolute()


@contextlib.contextmanager
def replacing(path: epath.Path, check: Callable[[], None]) -> Iterator[epath.Path]:
    """Yield where to write a checkpoint, which takes the place of `path` once it is complete.

    Every process of a program enters it. An error in the body leaves `path` as it was. What killed
    writers of `path` left is removed first.

    Args:
      path: what `resolve` returned.
      check: raises if `path` must not be replaced; called when nobody else can write it.

    Raises:
      FileExistsError: somebody else is writing `path`.
    """
    with contextlib.ExitStack() as held:

        def begin() -> str:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_claim(path) if local else _remote(folder))
            if not path.exists() and _is_between(folder):
                (folder / _NEW).rename(path)
            check()
            if local:
                clear(Path(folder))
            return secrets.token_hex(8)

        def end() -> None:
            check()  # somebody who does not use this function may have put something there
            if local:
                _sync(made)
            made.rename(folder / _NEW)
            _exchange(path, folder, local)

        folder, local = _folder(path), _is_local(path)
        # A name of its own: threads of a save that has failed may still write where it wrote.
        made = folder / f"{_NEW}-{_on_first_process(begin, path)}"
        yield made
        _on_first_process(end, path)


def read_unmixed(path: epath.Path, read: Callable[[epath.Path], T]) -> T:
    """Return what `read` makes of the directory at `path`, all of it from one save.

    `read` gets the directory to read. It is called again if the directory was replaced meanwhile,
    whether or not it has noticed.

    Raises:
      FileNotFoundError: there is no complete directory at `path`.
    """
    # Several processes read in step, so that one of them cannot start again alone.
    for pause in _PAUSES if jax.process_count() == 1 else ():
        before = _stamp(path)
        try:
            found = read(_current(path))
        except Exception:
            if _stamp(path) == before:
                raise
        else:
            if _stamp(path) == before:
                return found
        time.sleep(pause)
    return read(_current(path))


def _current(path: epath.Path) -> epath.Path:
    """Return the complete checkpoint: at `path`, or where an unfinished exchange has left it."""
    if path.exists():
        return path
    folder = _folder(path)
    if _is_between(folder):
        return folder / _NEW
    # An earlier release left siblings with the names of its own and of Orbax.
    starts = (f"{path.name}.orbax-checkpoint-tmp", f"{path.name}.q4jax-", folder.name)
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    left = sorted(p.name for p in siblings if p.name.startswith(starts))
    reason = f"; an interrupted save left {', '.join(left)}" if left else ""
    raise FileNotFoundError(f"no checkpoint at {path}{reason}")


def _stamp(path: epath.Path) -> Any:
    """Return what tells one directory at `path` from the next, None where there is none."""
    try:
        return (path / _STAMP).read_bytes()
    except OSError:
        return path.exists()


def _exchange(path: epath.Path, folder: epath.Path, local: bool) -> None:
    mode = None
    try:
        if path.exists():
            mode = stat.S_IMODE(os.stat(path).st_mode) if local else None
            path.rename(folder / _OLD)
        (folder / _NEW).rename(path)
    except BaseException:
        if not path.exists() and (folder / _OLD).exists():
            (folder / _OLD).rename(path)
        raise
    if mode is not None:
        os.chmod(path, mode)
    if local:
        _sync_one(path.parent)


def _is_between(folder: Path | epath.Path) -> bool:
    """Return whether an exchange was interrupted between its two renames."""
    try:
        return (folder / _NEW).exists() and (folder / _OLD).exists()
    except PermissionError:  # another user's
        return False


def _claim(path: epath.Path) -> contextlib.AbstractContextManager[Path]:
    own, parent = Path(path), Path(path.parent)
    return claim(own, parent, keep=lambda folder: not own.exists() and _is_between(folder))


def _folder(path: epath.Path) -> epath.Path:
    return claimed(path, path.parent)


@contextlib.contextmanager
def _remote(folder: epath.Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        folder.rmtree()


def _sync(folder: epath.Path) -> None:
    """Wait until a directory and all in it are on the disk."""
    for where, _, names in os.walk(folder):
        for name in names:
            _sync_one(os.path.join(where, name))
        _sync_one(where)


def _sync_one(path: str | epath.PathLike) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _on_first_process(do: Callable[[], Any], path: epath.Path) -> Any:
    """Return what `do` returns on the first process; on every process, or an error on every one."""
    if jax.process_count() == 1:
        return do()
    failed, result = None, None
    if jax.process_index() == 0:
        try:
            result = do()
        except Exception as error:
            failed = error
    answer = json.dumps([failed is None, result if failed is None else str(failed)])[:_ANSWER]
    sent = np.frombuffer(answer.encode().ljust(_ANSWER), np.uint8)
    received = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent)))
    if failed is not None:
        raise failed
    ok, result = json.loads(received)
    if not ok:
        raise OSError(f"{path} is not saved: {result}")
    return result


# Bytes of an answer that the first process sends to the others.
_ANSWER = 4096
