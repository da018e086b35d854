"""Helpers of `finetune.py`: models, text, batches, the folder of a run, Ctrl-C."""

import json
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import demo
import gguf_llama
import jax
import numpy as np
from tokenizers import Tokenizer

from q4jax.models import Llama, from_pretrained


def load_model(folder: str | None) -> Llama:
    """Load the Hugging Face model in `folder`; None: the demo's SmolLM2."""
    return gguf_llama.load(demo.model_file()) if folder is None else from_pretrained(folder)


def load_tokenizer(folder: str | None) -> Tokenizer:
    """Load the tokenizer of the model that `load_model` loads."""
    if folder is None:
        return gguf_llama.load_tokenizer(demo.model_file())
    file = Path(folder, "tokenizer.json")
    if not file.is_file():
        raise SystemExit(f"--model: there is no {file}")
    return Tokenizer.from_file(str(file))


def load_text(file: str | None, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return training tokens and held-out ones, the last tenth of `file`; None: the demo's."""
    if file is None:
        train, held_out = demo.texts()
    else:
        text = Path(file).read_text(encoding="utf-8")
        cut = len(text) * 9 // 10
        train, held_out = text[:cut], text[cut:]
    return _encode(tokenizer, train), _encode(tokenizer, held_out)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def batch(tokens: np.ndarray, seed: int, step: int, size: int, length: int) -> np.ndarray:
    """Return the windows of one step, int32 `[size, length + 1]`, fixed by seed and step."""
    starts = np.random.default_rng([seed, step]).integers(0, tokens.size - length, size)
    return tokens[starts[:, None] + np.arange(length + 1)]


def windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """Return the first windows, int32 `[count, length]`; a short text gives less."""
    length = min(length, tokens.size)
    count = min(count, tokens.size // length)
    return tokens[: count * length].reshape(count, length)


def checksum(*arrays: np.ndarray) -> int:
    """Return a checksum of the arrays' content."""
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))


class Run:
    """The folder of a run: settings, log, and the paths of other files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.plot = folder / "loss.png"
        self.metrics = folder / "metrics.json"
        self.probe = folder / "probe.npz"
        self._settings = folder / "run.json"
        self._log = folder / "log.jsonl"

    @property
    def _writes(self) -> bool:
        return jax.process_index() == 0

    def create(self, settings: dict[str, Any], save: Callable[[], None]) -> None:
        """Start a new run: save the first checkpoint, then write the settings.

        With several processes, all call `save`; the first one writes the other files.
        """
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._settings.unlink(missing_ok=True)
            self._log.write_text("")
        save()
        if self._writes:
            self._settings.write_text(json.dumps(settings, indent=2, default=str))

    def settings(self) -> dict[str, Any]:
        """Return the settings that `create` wrote."""
        if not self._settings.is_file():
            raise SystemExit(f"{self.folder} holds no run to resume")
        return json.loads(self._settings.read_text())

    def log(self, **values: float) -> None:
        """Append values to the log, such as `step=3, loss=2.5`."""
        if self._writes:
            with self._log.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def history(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of each step that logged the value; the last one counts."""
        lines = map(json.loads, self._log.read_text().splitlines())
        return sorted({line["step"]: line[name] for line in lines if name in line}.items())

    def truncate(self, steps: int) -> None:
        """Remove the log entries after step `steps`."""
        if not self._writes:
            return
        lines = self._log.read_text().splitlines(keepends=True)
        self._log.write_text("".join(x for x in lines if json.loads(x)["step"] <= steps))

    def draw(self, baselines: dict[str, float]) -> None:
        """Plot the training loss and the held-out perplexity."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 6))
        top.plot(*zip(*self.history("perplexity"), strict=True), marker="o", label="fine-tuned")
        for style, (name, value) in zip(("--", ":"), baselines.items(), strict=True):
            top.axhline(value, linestyle=style, color="gray", label=name)
        top.set_ylabel("held-out perplexity")
        top.legend()
        bottom.plot(*zip(*self.history("loss"), strict=True))
        bottom.set(xlabel="step", ylabel="training loss (nats per token)")
        figure.tight_layout()
        figure.savefig(self.plot, dpi=120)
        plt.close(figure)


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the current step."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._previous)
