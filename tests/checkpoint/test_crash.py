"""Saves that are killed at random moments, and disks that are full: the last good step is there."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import q4jax

PREAMBLE = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
import q4jax
from q4jax import checkpoint

SPEC = q4jax.QuantSpec("nf4", 64, 256, "bfloat16", (512, 512))

def tree(step):
    rng = np.random.default_rng(step)
    bits = lambda *shape: jnp.asarray(rng.integers(0, 256, shape, np.uint8))
    floats = lambda *shape: jnp.asarray(rng.normal(size=shape).astype("f4"))
    state = q4jax.QuantState(bits(512, 8), floats(16), floats(), SPEC)
    return {"w": q4jax.Params4bit(bits(512, 256), state), "lora": floats(64, 64), "step": step}

def check(found):
    expected = tree(found["step"])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), found["step"]
    return found["step"]
"""

KILLED = """
path, kills = sys.argv[1], int(sys.argv[2])

# Each way to save: open, the step that is there (or None), and a save that returns once it is safe.
class Manager:
    def __init__(self, path, background):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=background)
        self.manager = ocp.CheckpointManager(path, options=options)
    def last(self):
        step = self.manager.latest_step()
        return None if step is None else check(checkpoint.restore_step(self.manager, step))
    def save(self, step):
        self.manager.save(step, args=checkpoint.save_args(tree(step)))
        self.manager.wait_until_finished()

class Replaced:
    def __init__(self, path):
        self.path = path + "/c"
    def last(self):
        try:
            return check(checkpoint.restore(self.path))
        except FileNotFoundError:
            return None
    def save(self, step):
        checkpoint.save(self.path, tree(step), force=True)

def make(way):
    folder = f"{path}/{way}"
    os.makedirs(folder, exist_ok=True)
    return Replaced(folder) if way == "replaced" else Manager(folder, way == "background")

def child(way, safe, pipe):
    saver = make(way)
    last = saver.last()
    # What was safe is there; a later one may be.
    assert safe is None or (last is not None and last >= safe), (last, safe)
    step = 0 if last is None else last + 1
    while True:
        os.write(pipe, b"%d begun\\n" % step)
        saver.save(step)
        os.write(pipe, b"%d safe\\n" % step)
        step += 1

ways = ["manager", "background", "replaced"]
safe, takes = dict.fromkeys(ways), {}
rng = random.Random(20261121)
during = 0
# Three more, which tell how long a save takes.
for kill in range(-3, kills):
    way = ways[kill % 3]
    reader, writer = os.pipe()
    # This process has started no thread: jax and Orbax start theirs in the child.
    process = os.fork()
    if process == 0:
        try:
            child(way, safe[way], writer)
        except BaseException as error:
            import traceback
            traceback.print_exc()
            os._exit(3)
    os.close(writer)
    lines = os.read(reader, 100)  # until the first save begins, or the child has failed
    if way in takes:
        time.sleep(rng.uniform(0, 2 * takes[way]))
    else:
        while lines.count(b"safe") < 3:
            start = time.monotonic()
            lines += os.read(reader, 100)
        takes[way] = 2 * (time.monotonic() - start)
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"kill {kill} of {way}: {status}"
    while block := os.read(reader, 65536):
        lines += block
    os.close(reader)
    *_, state = lines.split()
    during += kill >= 0 and state == b"begun"
    for line in lines.splitlines():
        step, what = line.split()
        safe[way] = int(step) if what == b"safe" else safe[way]
for way in ways:
    last = make(way).last()
    assert safe[way] is None or last >= safe[way], (way, last, safe)
    print(way, last)
print("during", during)
"""


def run(code, *args, prefix=()):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(Path(q4jax.__file__).parents[1])
    command = [*prefix, sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.heavy
def test_kills_at_random_moments_lose_nothing(tmp_path, request):
    kills = request.config.getoption("--kills")
    *ways, during = run(KILLED, tmp_path, kills)
    assert [line.split()[0] for line in ways] == ["manager", "background", "replaced"]
    assert all(int(line.split()[1]) > 0 for line in ways), ways
    # Most of the kills hit a save and not the moment between two.
    assert int(during.split()[1]) > kills / 3, during


FULL = """
import resource
folder, how = sys.argv[1], sys.argv[2]
if how == "limit":  # of a file: as on a full disk, a write fails
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoint.save(folder + "/c", tree(1))
manager = ocp.CheckpointManager(folder + "/m")
manager.save(1, args=checkpoint.save_args(tree(1)))
manager.wait_until_finished()
filler = folder + "/filler"
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
else:
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            print("full", error.errno)
failed = 0
for save in (
    lambda: checkpoint.save(folder + "/c", tree(2), force=True),
    lambda: (manager.save(2, args=checkpoint.save_args(tree(2))), manager.wait_until_finished()),
):
    try:
        save()
    except Exception as error:
        failed += 1
        print(type(error).__name__, file=sys.stderr)
print("failed", failed)
# Other processes, on the disk as it is and with room again, find what was safe.
def found():
    return (check(checkpoint.restore(folder + "/c")),
            check(checkpoint.restore_step(ocp.CheckpointManager(folder + "/m"), 1)))
print("left", *found())
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
else:
    os.remove(filler)
checkpoint.save(folder + "/c", tree(3), force=True)
print("again", *found())
os._exit(0)  # the manager, whose save failed, would say so again
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_loses_nothing(tmp_path):
    lines = run(FULL, tmp_path, "limit")
    assert lines == ["failed 2", "left 1 1", "again 3 1"]


MOUNT = ["unshare", "--mount", "--map-root-user"]


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
    """On a disk of its own, of 2 MB: in a namespace of mounts, where the system allows one."""
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"
    allowed = (
        shutil.which("unshare")
        and not subprocess.run(
            [*MOUNT, "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    )
    if not allowed:
        pytest.skip("this system lets nobody mount a small disk")
    shell = [*MOUNT, "sh", "-c", f'{mount} && exec "$@"', "sh"]
    lines = run(FULL, tmp_path, "disk", prefix=shell)
    assert lines == ["full 28", "failed 2", "left 1 1", "again 3 1"]
