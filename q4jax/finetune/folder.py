"""The folder of a run: its settings, its log, its checkpoints, and the paths of what it writes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from q4jax import checkpoint
from q4jax.disk import whole_file
from q4jax.finetune.settings import SettingsError
from q4jax.interop.files import encode_json, read_json


class RunFolder:
    """A folder that holds a run, or will.

    Of several processes, the first one writes; checkpoints are written by all.

    Attributes:
      path: the folder.
      adapter: PEFT's files, the tokenizer and the model card.
      checkpoint: the whole model, with its adapters, as q4jax saves it.
      config: the `config.json` of the model.
      metrics: the numbers of a finished run.
      picture: losses by step.
      log: one line of JSON for each step and evaluation.
      tensorboard: the same for TensorBoard.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.adapter, self.checkpoint = self.path / "adapter", self.path / "checkpoint"
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.json"
        self.picture, self.log = self.path / "loss.png", self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self._steps, self._run = self.path / "checkpoints", self.path / "run.json"

    def exists(self) -> bool:
        """Return whether the folder holds a run."""
        return self._run.is_file()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise SettingsError unless a run can begin here, or go on."""
        if self.path.exists() and not self.path.is_dir():
            raise SettingsError(f"--out {self.path} is no folder")
        if resume and overwrite:
            raise SettingsError("--resume and --overwrite contradict each other")
        if resume and not self.exists():
            raise SettingsError(f"--resume: --out {self.path} holds no run")
        if self.exists() and not resume and not overwrite:
            raise SettingsError(
                f"--out {self.path} holds a run: --resume continues it, --overwrite replaces it"
            )

    def begin(self, description: Mapping[str, Any]) -> None:
        """Write the description of a new run; remove what an earlier one left."""
        if _writes():
            self.path.mkdir(parents=True, exist_ok=True)
            self._run.unlink(missing_ok=True)
            for folder in (self.adapter, self.checkpoint, self._steps, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.metrics, self.picture, self.config):
                file.unlink(missing_ok=True)
            self.log.write_text("")
        self.describe(description)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write the description of the run."""
        write_json(self._run, description)

    def description(self) -> dict[str, Any]:
        """Return the description; SettingsError if there is none."""
        if not self.exists():
            raise SettingsError(f"{self.path} holds no run")
        try:
            return read_json(self._run)
        except ValueError as error:
            raise SettingsError(str(error)) from None

    def record(self, values: Mapping[str, float]) -> None:
        """Append values to the log."""
        if _writes():
            with self.log.open("a") as file:
                file.write(json.dumps(dict(values)) + "\n")

    def history(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of each step that recorded the value."""
        lines = map(json.loads, self.log.read_text().splitlines())
        return sorted({line["step"]: line[name] for line in lines if name in line}.items())

    def forget(self, after: int) -> None:
        """Remove what the log has of later steps, which no checkpoint holds."""
        if _writes():
            lines = self.log.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= after]
            self.log.write_text("".join(kept))

    def saved(self) -> list[int]:
        """Return the steps that have a checkpoint."""
        found = self._steps.iterdir() if self._steps.is_dir() else []
        return sorted(int(p.name) for p in found if p.name.isdecimal() and (p / "q4jax").exists())

    def save(self, step: int, tree: Any, keep: int) -> None:
        """Write the checkpoint of a step, and remove the oldest."""
        checkpoint.save(self._steps / str(step), tree, force=True)
        if _writes():
            for old in self.saved()[:-keep]:
                shutil.rmtree(self._steps / str(old))

    def restore(self, step: int, target: Any) -> Any:
        """Read the checkpoint of a step."""
        return checkpoint.restore(self._steps / str(step), target)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, whole or not at all."""
    if _writes():
        with whole_file(path) as file:
            file.write(encode_json(value, path.name))


def _writes() -> bool:
    return jax.process_index() == 0
