"""`python -m q4jax finetune`."""

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from q4jax import finetune
from q4jax.cli.options import add_settings, given_settings
from q4jax.finetune.folder import RunFolder
from q4jax.finetune.placement import simulate
from q4jax.finetune.settings import Settings, resumed

P = TypeVar("P", bound=argparse.ArgumentParser)
_OUT = "finetune-out"

DESCRIPTION = """Train adapters of a language model whose weights are in 4 bits (QLoRA).

OUT gets: adapter/ (PEFT's files, the tokenizer, a model card), checkpoint/ (the whole model, as
q4jax saves it), config.json, metrics.json, loss.png, log.jsonl, and checkpoints/ to resume from.
Ctrl-C stops after the current step and saves; --resume goes on."""


def add_options(parser: P) -> P:
    """Add the options of the command; return the parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_settings(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out; --steps may change"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument(
        "--distributed", action="store_true", help="run as one of several processes on a cluster"
    )
    return parser


def main(options: argparse.Namespace) -> None:
    """Run the command; `finetune.SettingsError` says what is wrong with an option."""
    given = given_settings(options)
    if start(given, options) is None:
        out = given.get("out", _OUT)
        print(f"stopped and saved; go on with: python -m q4jax finetune --out {out} --resume")


def start(
    given: dict[str, Any],
    options: argparse.Namespace,
    sources: Callable[[Settings], dict[str, Any]] = lambda settings: {},
) -> dict[str, Any] | None:
    """Begin or resume a run.

    Args:
      given: the settings that are given.
      options: what `add_options` reads.
      sources: a function that returns what takes the place of a model and documents that the
        settings do not name: `base` and `documents`, as `finetune.run` takes them.

    Returns:
      As `finetune.run`.
    """
    folder = RunFolder(given.get("out", _OUT))
    folder.check(resume=options.resume, overwrite=options.overwrite)
    if options.resume:
        saved = Settings.from_json(folder.description()["settings"])
        settings = resumed(saved, given)
    else:
        settings = Settings(**{"model": None, **given})
    if options.distributed:
        jax.distributed.initialize()
    else:
        simulate(settings.mesh)
    if options.resume:
        changed = {name: value for name, value in given.items() if name != "out"}
        return finetune.resume(str(folder.path), **sources(settings), **changed)
    return finetune.run(settings, overwrite=options.overwrite, **sources(settings))
