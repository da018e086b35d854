"""Numbers by step: TensorBoard, the line of progress, and the picture."""

import io
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

import q4jax
from q4jax.finetune import make_optimizer, metrics
from q4jax.finetune.folder import RunFolder
from q4jax.finetune.optimizer import schedule
from q4jax.finetune.picture import draw, smoothed
from q4jax.finetune.settings import Settings


def test_tensorboard_reads_what_is_recorded(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    folder = RunFolder(tmp_path)
    writer = metrics.Metrics(folder, tensorboard=True)
    writer.record(1, loss=2.5)
    writer.record(2, loss=1.5, eval_loss=3.0)
    writer.close()
    assert folder.history("loss") == [(1, 2.5), (2, 1.5)]
    [file] = folder.tensorboard.iterdir()
    found, data = set(), file.read_bytes()
    while data:  # a record is a length in 8 bytes, its checksum in 4, the bytes, and theirs in 4
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(event.step, v.tag, v.simple_value) for v in event.summary.value}
        data = data[16 + size :]
    assert found == {(1, "loss", 2.5), (2, "loss", 1.5), (2, "eval_loss", 3.0)}


def test_without_its_package_tensorboard_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ValueError, match=r"tensorboardX is not installed; pip install 'q4jax\[tens"
    ):
        metrics.Metrics(RunFolder(tmp_path), tensorboard=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_line(monkeypatch):
    monkeypatch.setattr(metrics, "peak_bytes", lambda: 1_300_000_000)
    times = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(times))
    line = metrics.ProgressLine(steps=4, first=2, file=(file := Terminal()))
    line.show(3, 4.0, 1234.0)
    line.show(4, 2.0, 1000.0)
    first, second = file.getvalue().split("\r")[1:]
    assert first.rstrip() == ("step 3/4  loss 4.000  1,234 tokens/s  memory 1.3 GB  0:10 left")
    assert second.startswith("step 4/4  loss 3.800  1,000 tokens/s") and second.endswith("\n")


def test_elsewhere_lines_are_rare(monkeypatch):
    times = iter([0.0, *(float(second) for second in range(1, 31))])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(times))
    line = metrics.ProgressLine(steps=30, file=(file := io.StringIO()))
    for step in range(1, 31):
        line.show(step, 1.0, 1.0)
    shown = [int(text.split("/")[0][5:]) for text in file.getvalue().splitlines()]
    assert shown == [1, 11, 21, 30]


def test_the_picture_shows_smoothed_and_held_out_losses(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    assert draw(path, [(1, 3.0), (2, 1.0)], [(0, 4.0), (2, 2.0)], {"dense": 1.5})
    assert path.read_bytes().startswith(b"\x89PNG")
    assert smoothed((3.0, 1.0)) == pytest.approx([3.0, (0.9 * 3 + 1) / 1.9])
    assert draw(path, [(1, 3.0)], [], {})


def rates(**changed):
    settings = Settings(model=None, steps=10, learning_rate=1.0, warmup=0.2, **changed)
    return [float(schedule(settings)(step)) for step in range(11)]


def test_schedules():
    cosine, linear, constant = (rates(schedule=n) for n in ("cosine", "linear", "constant"))
    for found in (cosine, linear, constant):
        assert found[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert cosine[6] == pytest.approx(0.5) and cosine[10] == pytest.approx(0.0)
    assert cosine[4] == pytest.approx(0.8536, abs=1e-4)
    assert linear[4] == pytest.approx(0.75)
    assert constant[3:] == [1.0] * 8
    one = Settings(model=None, steps=1, learning_rate=1.0)
    assert float(schedule(one)(0)) == 1.0


def test_lora_plus_is_faster_for_the_second_factors():
    def moved(ratio):
        model = q4jax.quantize_model(nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0))))
        model = q4jax.add_lora(model, 2, 2, dora=True)
        settings = Settings(model=None, steps=1, learning_rate=0.1, loraplus=ratio)
        before = nnx.state(model, nnx.LoRAParam)
        grads = nnx.grad(
            lambda model: jnp.sum(model(jnp.ones((1, 64))) ** 2),
            argnums=nnx.DiffState(0, nnx.LoRAParam),
        )(model)
        old = {path[-1]: value[...] for path, value in nnx.to_flat_state(before)}
        make_optimizer(model, settings).update(model, grads)
        new = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        return {path[-1]: value[...] - old[path[-1]] for path, value in new}

    plain, faster = moved(1.0), moved(8.0)
    for name, ratio in (("lora_a", 1), ("lora_b", 8), ("magnitude", 8)):
        assert jnp.allclose(faster[name], plain[name] * ratio, rtol=1e-4), name
    assert jnp.abs(plain["lora_b"]).max() > 0.05
