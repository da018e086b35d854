"""Write a file or a directory so that it is there whole, or is not there.

Everything is prepared in a private folder (`claim`), brought to disk by fsync, and moved to its
place by a rename. After a crash the old state or the new one is there, and the next writer removes
what was left.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from q4jax.disk.claim import claim, claimed, clear, is_own

_NEW, _MOVED = "new", "moved"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Any]:
    """Yield a binary file that did not exist; at the end its bytes are on the disk.

    Raises:
      FileExistsError: there is something at `path`, also a link to nothing.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Any]:
    """Yield a binary file that appears at `path` at the end, unless an error was raised.

    It replaces a file and keeps its permissions. A link is replaced, and not what it points to.

    Args:
      path: the file; its folder must exist.
      replace: whether a file at `path` is replaced.

    Raises:
      FileExistsError: another thread or process is writing this path; what is there is no regular
        file; or it may not be replaced.
      FileNotFoundError: the folder does not exist.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is not a regular file and is not replaced")
    with claim(path, path.parent) as own:
        clear(own)
        if not replace and os.path.lexists(path):
            raise FileExistsError(f"{path} exists already")
        with new_file(own / _NEW) as file:
            yield file
            if path.exists():
                os.chmod(own / _NEW, stat.S_IMODE(path.stat().st_mode) & 0o777)
        os.replace(own / _NEW, path)
        _sync(path.parent)


@contextlib.contextmanager
def whole_directory(path: Path, last: str) -> Iterator[Path]:
    """Yield an empty folder; its files appear in the directory `path`, unless an error was raised.

    A directory that is missing or empty is replaced by the folder, in one step. If it holds other
    files, those of the folder are moved to it one by one, and `last` at the end: without this file
    there is nothing that a reader takes for complete, and the next writer removes the others.

    Args:
      path: the directory; its parents are made.
      last: the file without which the directory is not read. `new_file` writes it and the others.

    Raises:
      FileExistsError: another thread or process is writing this path; what is there is no
        directory, or holds a file of the same name.
    """
    _make_folders(path.parent)
    stays = _stays(path)
    place = path.resolve() if stays else path
    if stays and os.path.lexists(claimed(place, place.parent)):
        with claim(place, place.parent):  # left by a writer that was killed after it made `place`
            pass
    with claim(place, place if stays else place.parent) as own:
        _take_back(own, place, last)
        clear(own)
        os.mkdir(own / _NEW)
        yield own / _NEW
        _sync(own / _NEW)
        if stays:
            _move_into(own, place, last)
        else:
            _move_to(own / _NEW, place)


def _stays(path: Path) -> bool:
    """Return whether a directory is there that cannot be replaced by another."""
    if not path.is_dir():
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists already and is no directory")
        return False
    used = path.is_symlink() or os.path.ismount(path) or os.path.samefile(path, ".")
    mine = is_own(path.stat()) and os.access(path.parent, os.W_OK) and os.name != "nt"
    return used or not mine or bool(os.listdir(path))


def _move_to(new: Path, path: Path) -> None:
    """Move a folder to a path where nothing is, or an empty directory."""
    if path.is_dir():
        os.chmod(new, stat.S_IMODE(path.stat().st_mode))
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(f"{path} exists already: it was made meanwhile") from None
        raise
    _sync(path.parent)


def _move_into(own: Path, path: Path, last: str) -> None:
    """Move the files of the new folder into a directory, `last` at the end, or none of them."""
    names = sorted(os.listdir(own / _NEW), key=lambda name: (name == last, name))
    for name in names:
        if os.path.lexists(path / name):
            raise FileExistsError(f"{path / name} exists already")
    with new_file(own / _MOVED) as file:
        file.write(json.dumps(names).encode())
    _sync(own)
    try:
        for name in names:
            if name == last:
                _sync(path)
            os.rename(own / _NEW / name, path / name)
        _sync(path)
    except BaseException:
        _take_back(own, path, last)
        raise


def _take_back(own: Path, path: Path, last: str) -> None:
    """Remove the files that an interrupted `_move_into` has moved."""
    try:
        names = json.loads((own / _MOVED).read_bytes())
    except (FileNotFoundError, ValueError):  # a list that is not complete: nothing was moved
        return
    new = own / _NEW
    if os.path.lexists(path / last) or not os.path.lexists(new / last):
        return  # it is complete
    for name in names:
        if not os.path.lexists(new / name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path / name)


def _make_folders(path: Path) -> None:
    """Make a directory and its parents, on disk too."""
    if not path.is_dir():
        _make_folders(path.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
            _sync(path.parent)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    if os.name == "nt":  # which cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems
            raise
    finally:
        os.close(descriptor)
