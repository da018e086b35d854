"""Documents of a run as packed rows, with every check that needs no weights."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from q4jax.finetune.base import Base, check_layers
from q4jax.finetune.documents import Document, read_documents
from q4jax.finetune.packing import Rows, pack
from q4jax.finetune.placement import Placement
from q4jax.finetune.settings import Settings, SettingsError, flag, wrong
from q4jax.finetune.split import split


class Prepared(NamedTuple):
    """What a run trains on and is evaluated on.

    Attributes:
      rows: packed documents.
      held_out: the same; none if nothing is held out.
      checksum: of both.
    """

    rows: Rows
    held_out: Rows
    checksum: int


def read(settings: Settings) -> tuple[list[Document], list[Document]]:
    """Read the files of the settings: documents to train on, and held-out ones.

    Raises:
      SettingsError: `read_documents` and `split` raise it.
    """
    found = read_documents(settings.data)
    if settings.eval_data:
        return found, read_documents(settings.eval_data, "--eval-data")
    return split(found, settings.held_out, settings.seed)


def prepare(
    settings: Settings,
    base: Base,
    documents: tuple[Sequence[Document], Sequence[Document]] | None,
    placement: Placement,
) -> Prepared:
    """Check the settings against the model, and pack the documents.

    Raises:
      SettingsError: a row is longer than the model's context, the mesh does not divide the batch
        or the layers, no layer has the name of a target, the prompt is too long, or the
        documents have nothing to learn.
    """
    context = base.config.context_length
    eval_length = settings.eval_length or settings.length
    for name, length in (("length", settings.length), ("eval_length", eval_length)):
        if length > context:
            raise wrong(name, f"at most {context}, the model's context", length)
    rows = settings.batch // settings.accumulate
    if rows % placement.batch_parts:
        raise SettingsError(
            f"--batch {settings.batch} in {settings.accumulate} parts has {rows} rows at once, "
            f"which --mesh {settings.mesh} does not divide into {placement.batch_parts}"
        )
    if base.is_quantized:
        _check_unset(settings)
    check_layers(base, settings, placement)
    if settings.prompt is not None:
        _check_prompt(settings, base, context)
    train, held_out = read(settings) if documents is None else documents
    packed = [
        pack(base.tokenizer.documents(part, base.config.vocab_size), length)
        for part, length in ((train, settings.length), (held_out, eval_length))
    ]
    if not packed[0].learned:
        raise SettingsError("--data has no token to learn")
    if held_out and not packed[1].learned:
        raise SettingsError("the held-out documents have no token to learn")
    if settings.dense_baseline and not packed[1].learned:
        raise SettingsError("--dense-baseline needs documents to measure on: --held-out is 0")
    packed[1] = _some(packed[1], settings.eval_rows)
    return Prepared(packed[0], packed[1], _checksum(packed))


def _some(rows: Rows, count: int) -> Rows:
    """Return up to `count` rows, evenly spaced, since long documents are packed first."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return Rows(*(array[chosen] for array in dataclasses.astuple(rows)))


def _check_unset(settings: Settings) -> None:
    """Raise SettingsError if a setting asks for another base than one that is in 4 bits already."""
    defaults = Settings(model=None)
    for name in ("quant_type", "blocksize", "no_double_quant", "dense_baseline"):
        if getattr(settings, name) != getattr(defaults, name):
            raise SettingsError(f"{flag(name)}: --model is in 4 bits already")


def _check_prompt(settings: Settings, base: Base, context: int) -> None:
    assert settings.prompt is not None
    tokens = base.tokenizer.encode(settings.prompt)
    if not tokens.size:
        raise wrong("prompt", "a text that has tokens", settings.prompt)
    if tokens.max() >= base.config.vocab_size:
        raise SettingsError(
            f"--prompt: the tokenizer has token {tokens.max()}, the model has "
            f"{base.config.vocab_size} tokens"
        )
    if tokens.size + settings.new_tokens > context:
        raise SettingsError(
            f"--prompt has {tokens.size} tokens, and --new-tokens is {settings.new_tokens}: "
            f"together above {context}, the model's context"
        )


def _checksum(parts: list[Rows]) -> int:
    value = 0
    for rows in parts:
        for array in (rows.inputs, rows.targets, rows.weights, rows.segments):
            value = zlib.crc32(array.tobytes(), value)
    return value
