"""Files and directories that are whole or not there: crashes, other writers, links, permissions."""

import os
import threading
from pathlib import Path

import pytest

from q4jax.disk import claim as claims
from q4jax.disk import new_file, whole_directory, whole_file
from tests.support.disk_faults import DiskFaults, moments

PARTS = [bytes([n]) * 10_000 for n in range(20)]


def write(path, parts=PARTS, **options):
    with whole_file(path, **options) as file:
        for part in parts:
            file.write(part)


def fill(path, parts=PARTS):
    with whole_directory(path, "z") as folder:
        for number, part in enumerate(parts):
            with new_file(folder / f"{number:02}") as file:
                file.write(part)
        with new_file(folder / "z") as file:
            file.write(b"last")


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_file_is_the_old_or_the_new_one_at_every_moment(tmp_path, how):
    path, seen = tmp_path / "x", []
    for faults in moments(how):
        path.write_bytes(b"old")
        with faults:
            write(path)
        seen.append(path.read_bytes())
        assert seen[-1] in (b"old", b"".join(PARTS))
        if how == "full":
            assert names(tmp_path) == ["x"]  # an error tidies up
        with DiskFaults():
            write(path, [b"again"])
        assert path.read_bytes() == b"again"
        assert names(tmp_path) == ["x"]
    assert len(seen) > 28
    assert b"old" in seen[:-1]
    assert seen[-1] == b"".join(PARTS)


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("before", ["missing", "empty", "used"])
def test_a_directory_is_complete_or_not_there_at_every_moment(tmp_path, how, before):
    path, others = tmp_path / "d", {"missing": [], "empty": [], "used": ["00.txt", "sub"]}[before]
    complete = sorted([*(f"{n:02}" for n in range(len(PARTS))), "z", *others])
    found = []
    for faults in moments(how):
        if before != "missing":
            path.mkdir()
            path.chmod(0o750)
        for name in others:
            (path / name).mkdir()
        with faults:
            fill(path)
        found.append((path / "z").exists())
        if found[-1]:
            assert [n for n in names(path) if not n.startswith(".")] == complete
            (path / "z").unlink()
            for number in range(len(PARTS)):
                assert (path / f"{number:02}").read_bytes() == PARTS[number]
                (path / f"{number:02}").unlink()
        elif before != "used" or how == "full":
            assert not path.exists() or names(path) == others
        # The next one finds nothing in its way, and what was there is there.
        with DiskFaults():
            fill(path, PARTS[:3])
        assert names(path) == sorted(["00", "01", "02", "z", *others])
        assert names(tmp_path) == ["d"]
        if before != "missing":
            assert path.stat().st_mode & 0o777 == 0o750
        for name in names(path):
            (path / name).rmdir() if name in others else (path / name).unlink()
        path.rmdir()
    assert len(found) > 70
    assert not found[0]
    assert found[-1]


def test_an_error_of_the_writer_leaves_what_was_there(tmp_path):
    write(tmp_path / "x", [b"old"])
    for use in (whole_file(tmp_path / "x"), whole_directory(tmp_path / "d", "z")):
        with pytest.raises(KeyError), use:
            raise KeyError
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_one_writer_wins_and_the_others_are_told(tmp_path):
    for make, path in ((write, tmp_path / "x"), (fill, tmp_path / "d")):
        with whole_file(path), pytest.raises(FileExistsError, match=f"{path} is being written"):
            make(path)


def race(path, make, rounds, check):
    """Two threads that begin at once: at least one succeeds, and what is there is one's own."""
    told = 0
    for _ in range(rounds):
        start, won = threading.Barrier(2), []

        def work(number, start=start, won=won):
            start.wait()
            try:
                make(path, [bytes([number]) * 20_000] * 5)
                won.append(number)
            except FileExistsError as error:
                assert str(path) in str(error)  # noqa: PT017

        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won
        told += len(won) == 1
        assert check(path) in won
    return told


def test_threads_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes most of the time

    def one(path):
        (content,) = set(path.read_bytes())
        return content

    def same(path):
        (content,) = {one(file) for file in path.iterdir() if file.name != "z"}
        for file in path.iterdir():
            file.unlink()
        return content

    assert race(tmp_path / "x", write, 40, one) > 0
    assert race(tmp_path / "d", fill, 20, same) == 20  # a directory is not replaced
    assert names(tmp_path) == ["d", "x"]


def test_a_planted_link_is_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "x"
    victim.mkdir()
    (tmp_path / ".x.unfinished").symlink_to(victim)
    write(path, [b"new"])
    assert names(tmp_path) == ["victim", "x"]
    (tmp_path / ".x.unfinished").write_text("in the way")
    with pytest.raises(FileExistsError, match=r"\.x\.unfinished is in the way"):
        write(path)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError), new_file(tmp_path / "link"):
        pass
    assert names(victim) == []


def test_a_link_at_the_path_is_replaced_and_not_what_it_points_to(tmp_path):
    secret, link = tmp_path / "secret", tmp_path / "link"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    link.symlink_to(secret)
    write(link, [b"new"])
    assert (secret.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"secret", b"new", False)
    assert link.stat().st_mode & 0o777 == 0o600
    (tmp_path / "to_nothing").symlink_to(tmp_path / "nothing")
    write(tmp_path / "to_nothing", [b"new"])
    assert not (tmp_path / "nothing").exists()


def test_permissions_are_kept_and_nobody_sees_the_unfinished_file(tmp_path):
    path = tmp_path / "x"
    with whole_file(path):
        (own,) = tmp_path.iterdir()
        assert own.stat().st_mode & 0o777 == 0o700
    umask = os.umask(0o022)
    try:
        write(tmp_path / "fresh", [b""])
        assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o644
        for mode in (0o600, 0o640, 0o444):
            path.chmod(mode)
            write(path, [b"new"])
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(umask)


def test_what_is_no_file_and_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("folder", "pipe"):
        with pytest.raises(FileExistsError, match="is not a regular file and is not replaced"):
            write(tmp_path / name)
    for name in ("file", "link", "pipe"):
        with pytest.raises(FileExistsError, match="exists already and is no directory"):
            fill(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'missing'}"):
        write(tmp_path / "missing" / "x")
    with pytest.raises(FileExistsError, match="file exists already"):
        write(tmp_path / "file", replace=False)
    assert names(tmp_path) == ["file", "folder", "link", "pipe"]
    assert (tmp_path / "file").read_text() == "kept"


def test_the_current_directory_and_a_linked_one_stay(tmp_path, monkeypatch):
    for name in ("here", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "here")
    fill(Path())
    fill(tmp_path / "link")
    for name in ("here", "real", "link"):
        assert len(names(tmp_path / name)) == len(PARTS) + 1
    assert (tmp_path / "link").is_symlink()
    assert names(".") == names(tmp_path / "here")


def test_a_file_that_is_in_the_directory_is_not_replaced(tmp_path):
    (tmp_path / "01").write_text("kept")
    with pytest.raises(FileExistsError, match="01 exists already"):
        fill(tmp_path)
    assert names(tmp_path) == ["01"]
    assert (tmp_path / "01").read_text() == "kept"


def test_what_was_left_beside_a_directory_is_removed(tmp_path):
    """By a writer that was killed after its last rename, before it had tidied up."""
    fill(tmp_path / "d", PARTS[:2])
    (tmp_path / ".d.unfinished").mkdir(0o700)
    (tmp_path / ".d.unfinished" / "lock").touch()
    with pytest.raises(FileExistsError, match="00 exists already"):
        fill(tmp_path / "d")
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["00", "01", "z"]


def test_parents_are_made_and_long_names_are_taken(tmp_path):
    fill(tmp_path / "a" / "b" / ("n" * 255))
    write(tmp_path / ("n" * 255))
    assert names(tmp_path) == ["a", "n" * 255]


@pytest.mark.parametrize("locks", [None, "unsupported"])
def test_without_locks_a_leftover_is_named(tmp_path, monkeypatch, locks):
    if locks:

        def unsupported(*_):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(claims.fcntl, "flock", unsupported)
    else:
        monkeypatch.setattr(claims, "fcntl", None)
    write(tmp_path / "x", [b"1"])
    write(tmp_path / "x", [b"2"])
    assert names(tmp_path) == ["x"]
    with whole_file(tmp_path / "x"), pytest.raises(FileExistsError, match="or a killed writer has"):
        write(tmp_path / "x")


def test_everything_is_on_disk_before_it_is_there(tmp_path, monkeypatch):
    """fsync of the file, rename, fsync of the folder, in this order."""
    steps, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replaced(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path / "x", [b"1"])
    assert steps == [str(tmp_path / ".x.unfinished" / "new"), "rename", str(tmp_path)]


def test_what_a_failed_writer_left_is_removed_while_its_threads_still_write(tmp_path, monkeypatch):
    real, late = os.rmdir, iter(["a", "b"])

    def rmdir(path, **where):
        if path == "left" or str(path).endswith("/left"):
            for name in late:
                (tmp_path / "own" / "left" / name).write_bytes(b"late")
                break
        real(path, **where)

    (tmp_path / "own" / "left" / "inner").mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", rmdir)
    claims.clear(tmp_path / "own")
    assert names(tmp_path / "own") == []
    assert next(late, None) is None  # both came
