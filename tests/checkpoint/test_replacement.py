"""One writer of a checkpoint wins, the others are told, and readers get the old or the new one."""

import os
import threading

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import q4jax
from q4jax import checkpoint, checkpoint_v1
from q4jax.checkpoint import replacement
from tests.support.disk_faults import moments


def tree(step):
    weight = q4jax.Params4bit.quantize(jnp.full((4, 64), float(step)), quant_type="nf4")
    return {"w": weight, "x": jnp.full(3, float(step)), "step": step}


def step_of(found):
    """The step of a checkpoint, all of whose leaves are of one step."""
    assert found["x"].tolist() == [found["step"]] * 3
    assert q4jax.fingerprint(found) == q4jax.fingerprint(tree(found["step"]))
    return found["step"]


def start(*works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("existing", [False, True])
def test_of_two_saves_at_once_one_wins_and_the_other_is_told(tmp_path, existing):
    path, trees = tmp_path / "c", [tree(1), tree(2)]
    told = 0
    for round in range(8):
        path = tmp_path / str(round) / "c"
        if existing:
            checkpoint.save(path, tree(0))
        barrier, won = threading.Barrier(2), []

        def save(number, path=path, barrier=barrier, won=won):
            barrier.wait()
            try:
                checkpoint.save(path, trees[number], force=True)
                won.append(trees[number]["step"])
            except FileExistsError as error:
                assert f"{path} is being written" in str(error)  # noqa: PT017

        for thread in start(lambda s=save: s(0), lambda s=save: s(1)):
            thread.join()
        assert step_of(checkpoint.restore(path)) == won[-1]
        assert os.listdir(path.parent) == ["c"]
        told += len(won) == 1
    assert told > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_reader_during_replacements_gets_one_or_the_other(tmp_path):
    path, trees = tmp_path / "c", [tree(1), tree(2)]
    checkpoint.save(path, trees[0])
    errors, steps, done = [], [], threading.Event()

    def read():
        while not done.is_set():
            try:
                steps.append(step_of(checkpoint.restore(path)))
            except Exception as error:
                errors.append(error)

    (thread,) = start(read)
    try:
        for number in range(20):
            checkpoint.save(path, trees[number % 2], force=True)
    finally:
        done.set()
        thread.join()
    assert errors == []
    assert set(steps) == {1, 2}


def test_a_replacement_that_no_reader_can_overtake_is_read_in_the_end(tmp_path, monkeypatch):
    """A read that mixes two saves is done again; with an error if the mix has one."""
    path = replacement.resolve(tmp_path / "c")
    checkpoint.save(path, tree(1))
    calls = []

    def read(current):
        calls.append(current)
        if len(calls) < 3:
            checkpoint.save(path, tree(len(calls) + 1), force=True)
        if len(calls) == 1:
            raise ValueError("the files are of another save")
        return step_of(checkpoint.restore(current))

    assert replacement.read_unmixed(path, read) == 3
    assert len(calls) == 3
    calls = [0] * 3
    monkeypatch.setattr(replacement, "_stamp", lambda path: "the same")
    with pytest.raises(ZeroDivisionError):
        replacement.read_unmixed(path, lambda current: 1 / 0)


def test_between_the_two_renames_the_new_one_is_read_and_then_moved(tmp_path):
    path, own = tmp_path / "c", tmp_path / ".c.unfinished"
    for name, step in (("old", 1), ("new", 2)):
        checkpoint.save(own / name, tree(step))
    assert step_of(checkpoint.restore(path)) == 2
    assert step_of(checkpoint_v1.restore(path)) == 2
    with pytest.raises(FileExistsError, match=f"path {path} exists already"):
        checkpoint.save(path, tree(3))
    assert os.listdir(tmp_path) == ["c"]
    assert step_of(checkpoint.restore(path)) == 2


def test_a_first_save_that_did_not_end_is_named_and_removed(tmp_path):
    path, own = tmp_path / "c", tmp_path / ".c.unfinished"
    checkpoint.save(own / "new", tree(1))
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}; .* left .c.unfinished"):
        checkpoint.restore(path)
    checkpoint.save(path, tree(2))
    assert os.listdir(tmp_path) == ["c"]


def test_what_appears_during_a_save_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save = ocp.Checkpointer.save

    def slow(*args, **kwargs):
        save(*args, **kwargs)
        path.mkdir()
        (path / "thesis.txt").write_text("mine")

    monkeypatch.setattr(ocp.Checkpointer, "save", slow)
    with pytest.raises(FileExistsError, match="force=True replaces checkpoints of q4jax only"):
        checkpoint.save(path, tree(1), force=True)
    assert os.listdir(path) == ["thesis.txt"]
    assert os.listdir(tmp_path) == ["c"]


def test_links_and_permissions_stay(tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    checkpoint.save(real, tree(1))
    real.chmod(0o700)
    link.symlink_to(real)
    checkpoint.save(link, tree(2), force=True)
    assert link.is_symlink()
    assert step_of(checkpoint.restore(real)) == 2
    assert real.stat().st_mode & 0o777 == 0o700
    assert os.listdir(real.parent) == ["real"]
    with pytest.raises(FileExistsError, match="exists already"):
        checkpoint.save(link, tree(3))
    # Nobody can foresee a name that is followed.
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / ".planted.unfinished").symlink_to(victim)
    checkpoint.save(tmp_path / "planted", tree(3))
    assert os.listdir(victim) == []


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_old_or_the_new_one_is_there_at_every_moment(tmp_path, how, first):
    trees, seen = [tree(step) for step in range(3)], []
    for number, faults in enumerate(moments(how)):
        path = tmp_path / str(number) / "c"
        path.parent.mkdir()
        if not first:
            checkpoint.save(path, trees[0])
        with faults:
            checkpoint.save(path, trees[1], force=not first)
        try:
            seen.append(step_of(checkpoint.restore(path)))
        except FileNotFoundError:
            assert first
            seen.append(None)
        checkpoint.save(path, trees[2], force=seen[-1] is not None)
        assert step_of(checkpoint.restore(path)) == 2
        assert os.listdir(path.parent) == ["c"]
    assert len(seen) > 50
    assert seen[0] == (None if first else 0)
    assert seen[-1] == 1
