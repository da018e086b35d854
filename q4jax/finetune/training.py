"""The steps of a run, from the first or from where it was stopped."""

import dataclasses
import time
from typing import Any

from flax import nnx

from q4jax.checkpoint import adapter_state, with_adapters
from q4jax.finetune.batches import Batches
from q4jax.finetune.folder import RunFolder
from q4jax.finetune.interrupt import Interrupt
from q4jax.finetune.metrics import Metrics, ProgressLine
from q4jax.finetune.optimizer import make_optimizer, schedule
from q4jax.finetune.packing import Rows
from q4jax.finetune.placement import Placement
from q4jax.finetune.settings import Settings, SettingsError
from q4jax.finetune.step import evaluate, train_step
from q4jax.models.decoder.decoder import Llama
from q4jax.tree.fingerprint import fingerprint


@dataclasses.dataclass
class Training:
    """A model with adapters, its optimizer, and what they are trained on.

    Attributes:
      settings: those of the run.
      folder: that of the run.
      model: the model.
      optimizer: its optimizer.
      rows: packed documents.
      held_out: the same, for evaluation.
      placement: that of the model.
      base: fingerprint of the frozen weights.
    """

    settings: Settings
    folder: RunFolder
    model: Llama
    optimizer: Any
    rows: Rows
    held_out: Rows
    placement: Placement
    base: str

    @classmethod
    def begin(
        cls,
        settings: Settings,
        folder: RunFolder,
        model: Llama,
        rows: Rows,
        held_out: Rows,
        placement: Placement,
    ) -> "Training":
        """Place the adapters, and make their optimizer."""
        placement.place(model, nnx.LoRAParam)
        optimizer = placement.place(make_optimizer(model, settings))
        base = fingerprint(model)
        return cls(settings, folder, model, optimizer, rows, held_out, placement, base)

    @property
    def done(self) -> int:
        """The number of steps that were done."""
        return int(self.optimizer.step[...])

    def resume(self) -> None:
        """Go on from the last checkpoint; without one, from the start.

        Raises:
          SettingsError: the base or its adapters are not those of the run, or it has done more
            steps than it should.
        """
        saved = self.folder.saved()
        if saved and saved[-1] > self.settings.steps:
            raise SettingsError(
                f"--steps must be at least {saved[-1]}, the steps that the run has done, got "
                f"{self.settings.steps}"
            )
        if saved:
            try:
                tree = self.folder.restore(saved[-1], self._tree())
                self.model = with_adapters(self.model, tree["adapters"])
            except ValueError as error:
                raise SettingsError(f"--resume: {error}") from None
            nnx.update(self.model, tree["streams"])
            self.optimizer = tree["optimizer"]
        self.folder.forget(self.done)

    def save(self) -> None:
        """Write a checkpoint of the step."""
        self.folder.save(self.done, self._tree(), self.settings.keep)

    def _tree(self) -> dict[str, Any]:
        return {
            "adapters": adapter_state(self.model, base=self.base),
            "optimizer": self.optimizer,
            "streams": nnx.state(self.model, nnx.RngState),
        }

    def evaluate(self) -> float | None:
        """Return the loss of the held-out rows; None if there are none."""
        if not len(self.held_out):
            return None
        batch = self.settings.batch // self.settings.accumulate
        return evaluate(self.model, self.held_out, batch=batch, placement=self.placement)

    def run(self, metrics: Metrics) -> bool:
        """Do the steps that are left; return False if Ctrl-C stopped them."""
        settings, first = self.settings, self.done
        batches = Batches(self.rows, settings.batch, settings.accumulate, settings.seed)
        line, rate = ProgressLine(settings.steps, first), schedule(settings)
        self.model.train()
        with Interrupt() as interrupt:
            for step in range(first + 1, settings.steps + 1):
                began = time.perf_counter()
                arrays = batches.step(step)
                batch = self.placement.batch(arrays, rows=1)
                found = train_step(self.model, self.optimizer, batch, placement=self.placement)
                loss, norm = (float(value) for value in found)
                speed = arrays["targets"].size / (time.perf_counter() - began)
                metrics.record(
                    step,
                    loss=loss,
                    grad_norm=norm,
                    learning_rate=float(rate(step - 1)),
                    tokens_per_second=speed,
                )
                line.show(step, loss, speed)
                stops = interrupt.asked or step == settings.steps
                if stops or step % settings.save_every == 0:
                    self.save()
                if stops:
                    return step == settings.steps
                if step % settings.eval_every == 0:
                    held_out = self.evaluate()
                    if held_out is None:
                        continue
                    metrics.record(step, eval_loss=held_out)
                    line.say(f"step {step}: held-out loss {held_out:.4f}")
        return True
