"""The private folder in which one writer prepares what will be at a path."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"
# A removal that a thread has disturbed starts again after each of these pauses, in seconds.
_PAUSES = (0.01, 0.05, 0.2, 1.0)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def claim(
    target: Path, folder: Path, keep: Callable[[Path], bool] = lambda own: False
) -> Iterator[Path]:
    """Yield a folder of its own to the only writer of a target; remove it at the end.

    It is `.<name>.unfinished`, and nobody else can open it. A writer that is killed leaves it, and
    the next writer of the target gets it with its content. A lock, which the system releases when a
    process ends, tells the two cases apart.

    Args:
      target: the path that will be written.
      folder: where the folder is made, on the file system of the target.
      keep: whether the folder, as it is at the end, must stay for the next writer.

    Raises:
      FileExistsError: the target is being written by another thread or process.
      FileNotFoundError: `folder` does not exist.
    """
    own = claimed(target, folder)
    lock = _take(own, target)
    try:
        yield own
    finally:
        # What cannot be removed is taken over by the next writer.
        try:
            with contextlib.suppress(OSError):
                if not keep(own):
                    clear(own)
                os.unlink(own / _LOCK)
                os.rmdir(own)
        finally:
            if lock is not None:
                os.close(lock)


def claimed(target: Path, folder: Path) -> Path:
    """Return the path of the folder that `claim` makes."""
    return folder / _name(target.name)


def clear(own: Path) -> None:
    """Remove what is in a folder of `claim`."""
    for name in sorted(os.listdir(own)):
        path = own / name
        if name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            _remove_folder(path)
        else:
            os.unlink(path)


def _remove_folder(path: Path) -> None:
    """Remove a folder in which threads of a writer that has failed may still make files."""
    for pause in (*_PAUSES, None):
        try:
            shutil.rmtree(path)
        except OSError as error:
            if pause is None or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            time.sleep(pause)
        if not path.exists():
            return


def _name(name: str) -> str:
    found = f".{name}.unfinished"
    if len(os.fsencode(found)) > 255:  # the longest name that file systems take
        found = f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.unfinished"
    return found


def _take(own: Path, target: Path) -> int | None:
    """Make the folder, or take over that of a killed writer; return the descriptor of its lock.

    Where the system has no locks, None: making the folder is what one writer can do only.
    """
    busy = FileExistsError(f"{target} is being written by another thread or process")
    while True:
        made = _make(own)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            descriptor = os.open(own / _LOCK, flags, 0o600)
        except FileNotFoundError:  # its writer has just finished
            continue
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(own)
            raise
        try:
            if not _lock(descriptor):
                if made:
                    os.close(descriptor)
                    return None
                raise FileExistsError(
                    f"{target} is being written, or a killed writer has left {own}; its file "
                    "system has no locks to tell: delete the folder if nobody writes"
                )
            if os.path.samestat(os.fstat(descriptor), os.lstat(own / _LOCK)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise busy from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the lock of a folder that its writer has just removed


def _make(own: Path) -> bool:
    """Return whether the folder is new; OSError if it exists and is not this user's."""
    try:
        os.mkdir(own, 0o700)
        return True
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no folder {own.parent}") from None
    except FileExistsError:
        pass
    try:
        status = os.lstat(own)
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(status.st_mode):
        # Somebody who may write here could lead the writer elsewhere.
        os.unlink(own)
    elif not stat.S_ISDIR(status.st_mode) or not is_own(status):
        raise FileExistsError(f"{own} is in the way: it is not a folder of this user")
    return False


def is_own(status: Any) -> bool:
    """Return whether the user of this process owns a file."""
    return os.name == "nt" or status.st_uid == os.geteuid()


def _lock(descriptor: int) -> bool:
    """Lock a file; False where the system has no locks, BlockingIOError if it is locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
