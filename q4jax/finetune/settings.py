"""The settings of a fine-tuning run, each with its help text and the values that it may have."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from q4jax.core.codebooks import BLOCKSIZES, CODEBOOKS
from q4jax.finetune import mesh_text


class SettingsError(ValueError):
    """A setting, or what it names, is wrong; the message is one line that names it."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
      what: the rule in words, after "must be".
      holds: a function that tells whether a value of the field's type is allowed.
    """

    what: str
    holds: Callable[[Any], bool]


def _one_of(values: tuple[Any, ...]) -> Rule:
    return Rule(f"one of {', '.join(map(str, values))}", lambda value: value in values)


COUNT = Rule("an integer of at least 1", lambda value: value >= 1)
_NATURAL = Rule("an integer of at least 0", lambda value: value >= 0)
_SEED = Rule("an integer from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
_POSITIVE = Rule("a positive number", lambda value: 0 < value < math.inf)
_ZERO_UP = Rule("a number of at least 0", lambda value: 0 <= value < math.inf)
_RATE = Rule("a number from 0 to below 1", lambda value: 0 <= value < 1)
_SHARE = Rule("a number from 0 to 1", lambda value: 0 <= value <= 1)
_SOME = Rule("at least one", lambda values: len(values) > 0)


def _setting(help_text: str, default: Any = dataclasses.MISSING, rule: Rule | None = None) -> Any:
    metadata = {"help": help_text, "rule": rule}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run; the options of `python -m q4jax finetune` have the same names.

    Raises:
      SettingsError: a value is of another type or out of range; the message names the option, the
        value and what is allowed.

    Examples:
      >>> Settings(model="llama", data=("chats.jsonl",), rank=0)
      Traceback (most recent call last):
      q4jax.finetune.settings.SettingsError: --rank must be an integer of at least 1, got 0
    """

    model: str | None = _setting("directory, or name on the Hugging Face hub: org/name[@revision]")
    data: tuple[str, ...] = _setting(
        "files of documents: text (one document each), or JSON lines with text, prompt and "
        "completion, or messages",
        (),
    )
    eval_data: tuple[str, ...] = _setting("files of held-out documents, in place of --held-out", ())
    held_out: float = _setting("share of --data that is held out for evaluation", 0.1, _RATE)
    out: str = _setting("folder for the results", "finetune-out")
    steps: int = _setting("optimizer steps", 100, COUNT)
    batch: int = _setting("rows of a step", 4, COUNT)
    accumulate: int = _setting("parts that the rows of a step are computed in", 1, COUNT)
    length: int = _setting("tokens of a row", 512, COUNT)
    rank: int = _setting("rank of the adapters", 16, COUNT)
    alpha: float = _setting("numerator of the adapters' scale", 16.0, _POSITIVE)
    rslora: bool = _setting("scale by alpha / sqrt(rank) instead of alpha / rank", False)
    dora: bool = _setting("train the norms of the weights' columns too", False)
    dropout: float = _setting("share of the adapters' input that is zeroed", 0.0, _RATE)
    targets: str | None = _setting(
        "layers to adapt, a regular expression for whole paths (default: all 4-bit layers)", None
    )
    learning_rate: float = _setting("peak learning rate, after warm-up", 2e-4, _POSITIVE)
    loraplus: float = _setting(
        "factor of the learning rate of lora_B and magnitudes (LoRA+)", 1.0, _POSITIVE
    )
    schedule: str = _setting(
        "learning rate after warm-up", "cosine", _one_of(("cosine", "linear", "constant"))
    )
    warmup: float = _setting("share of the steps that warm up", 0.1, _SHARE)
    weight_decay: float = _setting("weight decay of AdamW", 0.0, _ZERO_UP)
    clip: float = _setting("largest norm of a step's gradient", 1.0, _POSITIVE)
    quant_type: str = _setting("4-bit data type", "nf4", _one_of(tuple(CODEBOOKS)))
    blocksize: int = _setting("weights that share a scale", 64, _one_of(BLOCKSIZES))
    no_double_quant: bool = _setting("keep the scales in float32", False)
    dtype: str | None = _setting(
        "compute dtype (default: that of the model)",
        None,
        _one_of((None, "float32", "bfloat16", "float16")),
    )
    no_remat: bool = _setting("store activations instead of computing them again", False)
    mesh: str | None = _setting(
        "device mesh with axes data, fsdp, tensor and expert, such as fsdp=4,tensor=2", None
    )
    eval_every: int = _setting("steps between evaluations", 20, COUNT)
    eval_rows: int = _setting("held-out rows of an evaluation", 64, COUNT)
    eval_length: int | None = _setting(
        "tokens of a held-out row (default: as --length)",
        None,
        Rule(COUNT.what, lambda value: value is None or value >= 1),
    )
    save_every: int = _setting("steps between checkpoints", 20, COUNT)
    keep: int = _setting("checkpoints that are kept", 2, COUNT)
    dense_baseline: bool = _setting("measure the dense model first, in its full memory", False)
    check_restore: bool = _setting("restore the result in a second process, bit for bit", False)
    tensorboard: bool = _setting("write metrics for TensorBoard too", False)
    prompt: str | None = _setting("text that is continued before and after training", None)
    new_tokens: int = _setting("tokens of the continuation", 48, COUNT)
    seed: int = _setting("random seed of adapters, batches and dropout", 0, _SEED)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _typed(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            rule: Rule | None = field.metadata["rule"]
            if rule is not None and not rule.holds(value):
                raise wrong(field.name, rule.what, value)
        if self.batch % self.accumulate:
            raise wrong("accumulate", f"a divisor of --batch {self.batch}", self.accumulate)
        if self.prompt == "":
            raise wrong("prompt", "a text that is not empty", self.prompt)
        if self.mesh is not None:
            try:
                mesh_text.sizes(self.mesh)
            except ValueError as error:
                raise SettingsError(f"--mesh {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return {name: _listed(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        """Return the settings of `to_json`; SettingsError if one is unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := values.keys() - known:
            raise SettingsError(f"unknown settings: {sorted(unknown)}")
        return cls(**values)


# What a resumed run may change: none of these alters what was computed.
CHANGING = ("steps", "save_every", "eval_every", "keep", "mesh", "tensorboard", "out", "no_remat")
# Files that are named by another path are the same files: their content is compared.
_PATHS = ("model", "data", "eval_data")


def resumed(saved: Settings, given: dict[str, Any]) -> Settings:
    """Return the settings of a run with the given ones that may change.

    Raises:
      SettingsError: a setting that may not change has another value.
    """
    merged = dataclasses.replace(saved, **given)
    for name in given:
        before, now = getattr(saved, name), getattr(merged, name)
        if name not in (*CHANGING, *_PATHS) and before != now:
            raise SettingsError(
                f"{flag(name)} {now} is not that of the run to resume, {before}; --overwrite "
                f"begins a new run"
            )
    return merged


def flag(name: str) -> str:
    """Return the option of a setting.

    >>> flag("learning_rate")
    '--learning-rate'
    """
    return f"--{name.replace('_', '-')}"


def wrong(name: str, what: str, value: Any) -> SettingsError:
    """Return the error for a setting that has another value than what it must be."""
    return SettingsError(f"{flag(name)} must be {what}, got {value!r}")


def located(settings: Settings) -> Settings:
    """Return settings with paths from the root, so that a run resumes from another folder."""
    data, eval_data = (
        tuple(map(_absolute, paths)) for paths in (settings.data, settings.eval_data)
    )
    model = settings.model
    if model is not None and Path(model).expanduser().is_dir():
        model = _absolute(model)
    return dataclasses.replace(settings, model=model, data=data, eval_data=eval_data)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _typed(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Return a value as the type of its field; SettingsError if it is of another one."""
    kind = field.type
    if kind == tuple[str, ...]:
        items = [value] if isinstance(value, str | Path) else value
        if isinstance(items, list | tuple) and all(isinstance(i, str | Path) for i in items):
            return tuple(map(str, items))
        raise wrong(field.name, "paths", value)
    if kind in (str, str | None) and isinstance(value, str | Path):
        return str(value)
    if kind in (str | None, int | None) and value is None:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind is float:
            return float(value)
        if kind in (int, int | None) and isinstance(value, int):
            return value
    rule: Rule | None = field.metadata["rule"]
    what = "true or false" if kind is bool else "a text" if rule is None else rule.what
    raise wrong(field.name, what, value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
