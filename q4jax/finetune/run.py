"""A run from its settings to the files that it leaves."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import q4jax
from q4jax import checkpoint
from q4jax.finetune.base import Base, adapt, find_base
from q4jax.finetune.documents import Document
from q4jax.finetune.folder import RunFolder, write_json
from q4jax.finetune.metrics import Metrics
from q4jax.finetune.output import write_adapter
from q4jax.finetune.picture import draw
from q4jax.finetune.placement import Placement
from q4jax.finetune.prepare import Prepared, prepare
from q4jax.finetune.restore import restored_elsewhere
from q4jax.finetune.settings import Settings, SettingsError, located, resumed
from q4jax.finetune.step import evaluate, without_dropout
from q4jax.finetune.tokens import Tokenizer
from q4jax.finetune.training import Training
from q4jax.models.decoder.decoder import Llama
from q4jax.models.generation.generate import generate
from q4jax.tree.memory import memory_report

# Documents to train on, and held-out ones.
Documents = tuple[Sequence[Document], Sequence[Document]]


def run(
    settings: Settings,
    *,
    overwrite: bool = False,
    base: Base | None = None,
    documents: Documents | None = None,
) -> dict[str, Any] | None:
    """Fine-tune a model, and write the results into the folder `settings.out`.

    Args:
      settings: what to do.
      overwrite: whether a run in the folder is replaced.
      base: the model, in place of `settings.model`.
      documents: those to train on and the held-out ones, in place of `settings.data`.

    Returns:
      The numbers that `metrics.json` has; None if Ctrl-C stopped the run.

    Raises:
      SettingsError: a setting, or what it names, is wrong. Nothing is written then.
    """
    folder = RunFolder(settings.out)
    folder.check(resume=False, overwrite=overwrite)
    return _Run(settings, folder, base, documents, None).go()


def resume(
    out: str,
    *,
    base: Base | None = None,
    documents: Documents | None = None,
    **changed: Any,
) -> dict[str, Any] | None:
    """Go on with a run that was stopped, or train a finished one further.

    The batches are those that the run would have had without a stop.

    Args:
      out: the folder of the run.
      base: as in `run`.
      documents: as in `run`.
      **changed: settings with other values. More `steps` follow the schedule of their number.

    Returns:
      As `run`.

    Raises:
      SettingsError: there is no run; a setting may not change; the model or the documents are not
        those that the run began with.
    """
    folder = RunFolder(out)
    folder.check(resume=True, overwrite=False)
    description = folder.description()
    settings = resumed(Settings.from_json(description["settings"]), {**changed, "out": out})
    return _Run(settings, folder, base, documents, description).go()


@dataclasses.dataclass
class _Run:
    """The parts of a run; `description` is what its folder says of it, None before the first."""

    settings: Settings
    folder: RunFolder
    base: Base | None
    documents: Documents | None
    description: dict[str, Any] | None

    def go(self) -> dict[str, Any] | None:
        placement = Placement(self.settings.mesh, self.settings.blocksize)
        with placement.active():
            return self._go(placement)

    def _go(self, placement: Placement) -> dict[str, Any] | None:
        began, settings = time.perf_counter(), self.settings
        base = find_base(settings, placement) if self.base is None else self.base
        data = prepare(settings, base, self.documents, placement)
        if self.description is not None and data.checksum != self.description["data"]:
            raise SettingsError("--data is not what the run began with")
        dense = self._dense(base, data, placement)
        model = base.load_4bit(settings, placement)
        described = {
            "settings": located(settings).to_json(),
            "data": data.checksum,
            "is_quantized": base.is_quantized,
            "config": model.config.to_hf(),
            "dtype": jnp.dtype(model.embed_tokens.dtype).name,
            "param_dtype": model.embed_tokens.embedding.dtype.name,
            "version": q4jax.__version__,
        }
        model = adapt(model, settings)
        parts = (data.rows, data.held_out)
        training = Training.begin(settings, self.folder, model, *parts, placement)
        if self.description is None:
            before = {"ppl_dense": dense, **self._before(training, base.tokenizer)}
            self.folder.begin({**described, "before": before})
        else:
            before = self.description["before"]
            training.resume()
            self.folder.describe({**described, "before": before})
        self._say(
            f"{len(data.rows)} rows of {settings.length} tokens, {data.rows.padding:.1%} padding"
        )
        metrics = Metrics(self.folder, settings.tensorboard)
        if self.description is None and before["loss_before"] is not None:
            metrics.record(0, eval_loss=before["loss_before"])
        try:
            if not training.run(metrics):
                return None
            numbers = self._finish(training, base, before, metrics)
        finally:
            metrics.close()
        numbers["seconds"] = time.perf_counter() - began
        write_json(self.folder.metrics, numbers)
        self._say(f"{self.folder.path}: adapter/, checkpoint/, metrics.json, loss.png")
        return numbers

    def _dense(self, base: Base, data: Prepared, placement: Placement) -> float | None:
        """Return the perplexity of the dense model, if it is asked for."""
        if not self.settings.dense_baseline:
            return None
        if self.description is not None:
            return None
        model = placement.place(base.load(None))
        value = math.exp(evaluate(model, data.held_out, placement=placement))
        self._say(f"held-out perplexity, dense: {value:.2f}")
        return value

    def _before(self, training: Training, tokenizer: Tokenizer) -> dict[str, Any]:
        """Measure the 4-bit model; fresh adapters change nothing."""
        report = memory_report(training.model)
        self._say(str(report))
        loss = training.evaluate()
        if loss is not None:
            self._say(f"held-out perplexity, 4 bits: {math.exp(loss):.2f}")
        return {
            "loss_before": loss,
            "ppl_quantized": None if loss is None else math.exp(loss),
            "bits_per_weight": report.bits_per_weight,
            "text_before": self._continuation(training.model, tokenizer, "before"),
        }

    def _finish(
        self, training: Training, base: Base, before: dict[str, Any], metrics: Metrics
    ) -> dict[str, Any]:
        settings, folder, model = self.settings, self.folder, training.model
        loss = training.evaluate()
        if loss is not None:
            metrics.record(settings.steps, eval_loss=loss)
            self._say(f"held-out perplexity, fine-tuned: {math.exp(loss):.2f}")
        model.eval()
        numbers = {
            **before,
            "loss_after": loss,
            "ppl_finetuned": None if loss is None else math.exp(loss),
            "steps": settings.steps,
            "tokens": settings.steps * settings.batch * settings.length,
        }
        checkpoint.save(folder.checkpoint, model, force=True)
        write_json(folder.config, model.config.to_hf())
        if jax.process_count() == 1:
            write_adapter(folder, model, base, settings, numbers)
            if settings.check_restore:
                numbers |= self._restored(training)
        else:
            self._say(f"several processes write no adapter: {folder.checkpoint} holds it")
        numbers["text_after"] = self._continuation(model, base.tokenizer, "after")
        if jax.process_index() == 0:
            lines = {"held out, dense": before["ppl_dense"]}
            lines = {name: math.log(value) for name, value in lines.items() if value is not None}
            draw(folder.picture, folder.history("loss"), folder.history("eval_loss"), lines)
        return numbers

    def _restored(self, training: Training) -> dict[str, Any]:
        rows = training.rows if training.held_out.learned == 0 else training.held_out
        found = restored_elsewhere(
            self.folder.path, training.model, rows.inputs[:1, :64], self.settings.mesh
        )
        same = found["restored_bit_identical"]
        self._say(
            f"restored in process {found['second_process_pid']}: logits bit-identical: {same}"
        )
        if not same:
            raise RuntimeError("the restored model computes other logits than the saved one")
        return found

    def _continuation(self, model: Llama, tokenizer: Tokenizer, when: str) -> str | None:
        """Return the prompt and a sampled continuation; None without a prompt."""
        settings = self.settings
        if settings.prompt is None:
            return None
        tokens = generate(
            without_dropout(model),
            [tokenizer.encode(settings.prompt).tolist()],
            settings.new_tokens,
            temperature=0.7,
            top_p=0.9,
            eos_token_id=tokenizer.eos,
            rng=jax.random.key(settings.seed),
        )
        text = tokenizer.decode(np.asarray(tokens[0]))
        self._say(f"--- {when} fine-tuning ---\n{text}\n---")
        return text

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            print(text, flush=True)
