"""A disk that is full, or a process that dies, at each call by which a writer changes the disk.

    for faults in moments("kill"):
        with faults:
            write(path)
        # the disk is as it was at that moment

The calls are those of `os`, and the writes of files that Python opens. What C++ code writes is not
seen. fsync is counted and not done.
"""

import builtins
import contextlib
import errno
import io
import itertools
import os
from unittest import mock

# By what a full disk can fail, and what else changes the disk.
ALLOCATE = ("mkdir", "open", "fsync", "rename", "replace", "link", "symlink", "write")
OTHERS = ("unlink", "remove", "rmdir", "chmod", "truncate")


class Died(BaseException):
    """The process is dead: no call after this one reaches the disk."""


class DiskFaults(contextlib.ExitStack):
    """A context in which call number `at` fails: "kill", with all calls after it; or "full", with
    those that need room. The context ends without an error if the fault is what ended the writer.

    calls: the number of calls so far. struck: whether one has failed.
    """

    def __init__(self, how="kill", at=None):
        super().__init__()
        self.how, self.at, self.calls, self.struck = how, at, 0, False

    def __enter__(self):
        super().__enter__()
        for name in (*ALLOCATE, *OTHERS):
            if name not in ("open", "write"):
                real = getattr(os, name)
                self.enter_context(mock.patch.object(os, name, self._counted(name, real)))
        self.enter_context(mock.patch.object(os, "open", self._os_open(os.open)))
        opened = self._open(io.open)
        for module in (io, builtins):
            self.enter_context(mock.patch.object(module, "open", opened))
        return self

    def __exit__(self, kind, error, trace):
        super().__exit__(None, None, None)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if self.struck:
            assert isinstance(error, Died) or full, f"call {self.at} failed, unnoticed: {error!r}"
        return self.struck

    def moment(self, name):
        """Count a call, and raise if it fails."""
        now = self.calls
        if self.at is not None and now >= self.at:
            self.struck |= self.how == "kill" or name in ALLOCATE
            if self.how == "kill":
                raise Died
            if name in ALLOCATE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        self.calls += 1

    def _counted(self, name, real):
        def call(*args, **kwargs):
            self.moment(name)
            return None if name == "fsync" else real(*args, **kwargs)

        return call

    def _os_open(self, real):
        def call(path, flags, *args, **kwargs):
            if flags & os.O_CREAT:
                self.moment("open")
            return real(path, flags, *args, **kwargs)

        return call

    def _open(self, real):
        faults = self

        class Raw(io.FileIO):
            def write(self, data):
                try:
                    faults.moment("write")
                except BaseException:
                    super().write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                    raise
                return super().write(data)

        def call(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return real(file, mode, *args, **kwargs)
            if not isinstance(file, int):
                faults.moment("open")
            binary = io.BufferedWriter(Raw(file, mode.replace("b", "").replace("t", "")))
            return binary if "b" in mode else io.TextIOWrapper(binary)

        return call


def moments(how):
    """Yield faults at the first call, the second, and so on until there is none."""
    for at in itertools.count():
        faults = DiskFaults(how, at)
        yield faults
        if not faults.struck and faults.calls <= at:
            return
