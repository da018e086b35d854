"""The commands of `python -m q4jax`: work on checkpoints, fine-tune models, and use them.

Exit codes: 0 success; 1 the checkpoint is damaged or does not fit (ValueError); 2 wrong command
line, or what it names; 3 a file is missing, exists already or cannot be written; 4 the checkpoint
format is not supported.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from q4jax.cli import estimate, formats, merge, stacked, text
from q4jax.cli import finetune as finetune_command
from q4jax.cli.options import Parser
from q4jax.cli.table import table
from q4jax.convert.config import HEAD, QuantConfig
from q4jax.core.codebooks import BLOCKSIZES, CODEBOOKS
from q4jax.finetune.settings import SettingsError
from q4jax.interop.bitsandbytes.tensors import CONTAINERS
from q4jax.interop.files import read_json
from q4jax.models.decoder.decoder import Llama

DAMAGED, USAGE, MISSING, UNSUPPORTED, INTERRUPTED = 1, 2, 3, 4, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code.

    Examples:
      >>> main(["inspect", "/nowhere"])
      3
    """
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SettingsError as error:
        return _fail(error, USAGE)
    except NotImplementedError as error:
        return _fail(error, UNSUPPORTED)
    except OSError as error:
        return _fail(error, MISSING)
    except (
        ValueError,
        RuntimeError,
    ) as error:  # Orbax raises RuntimeError for files it cannot decode
        return _fail(error, DAMAGED)
    return 0


def _fail(error: Exception, code: int) -> int:
    # Names from a file are untrusted: control characters must not reach the terminal.
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
    print(f"q4jax: {text}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; its result has the function `run`."""
    parser = Parser(
        prog="python -m q4jax",
        description="Inspect, verify and convert checkpoints: Hugging Face directories, "
        "bitsandbytes' safetensors files, Orbax checkpoints of q4jax, PEFT adapters. Fine-tune "
        "language models, and use them.",
        epilog="exit codes: 0 done, 1 the checkpoint is damaged or does not fit, 2 wrong command "
        "line (for finetune, generate, chat, merge and estimate missing files too), 3 a file is "
        "missing, exists already or cannot be written, 4 not supported",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    inspect = commands.add_parser("inspect", help="list the tensors of a checkpoint")
    inspect.add_argument("path")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="read a complete checkpoint and check it")
    verify.add_argument("path")
    verify.add_argument("--fingerprint", metavar="SHA256", help="expected fingerprint")
    verify.set_defaults(run=_verify)

    convert = commands.add_parser("convert", help="write a checkpoint in another format")
    convert.add_argument("source")
    convert.add_argument("target")
    convert.add_argument(
        "--to", choices=formats.WRITTEN, required=True, help="format of the target"
    )
    convert.add_argument("--quantize", choices=tuple(CODEBOOKS), help="quantize linear layers")
    convert.add_argument(
        "--modules",
        metavar="REGEX",
        help="the layers to quantize, by their whole paths (what transformers would quantize)",
    )
    convert.add_argument("--blocksize", type=int, choices=BLOCKSIZES, default=64)
    convert.add_argument("--plain", action="store_true", help="no double quantization")
    convert.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="MODULE",
        help="keep these modules dense, beside lm_head: a name, a path or a regular expression",
    )
    convert.add_argument("--quantize-head", action="store_true", help="quantize lm_head too")
    convert.add_argument("--quant-storage", choices=CONTAINERS, default="uint8")
    convert.add_argument(
        "--config", help="config.json of the model, where the source is a checkpoint without one"
    )
    convert.add_argument(
        "--alpha", type=float, metavar="A", help="alpha of the adapters of a checkpoint, to merge"
    )
    convert.add_argument(
        "--rslora", action="store_true", help="the adapters are scaled by alpha / sqrt(rank)"
    )
    convert.add_argument("--quiet", action="store_true", help="no progress bar")
    convert.set_defaults(run=_convert)

    tune = commands.add_parser(
        "finetune",
        help="train a language model's adapters (QLoRA)",
        description=finetune_command.DESCRIPTION,
    )
    finetune_command.add_options(tune).set_defaults(run=finetune_command.main)

    text.add_generate(commands.add_parser("generate", help="continue a prompt"))
    text.add_chat(commands.add_parser("chat", help="talk to a model", description=text.CHAT))
    merge.add_options(
        commands.add_parser(
            "merge", help="write a model with its adapter merged", description=merge.DESCRIPTION
        )
    )
    estimate.add_options(
        commands.add_parser(
            "estimate", help="print the memory of a model", description=estimate.DESCRIPTION
        )
    )
    return parser


def _inspect(options: argparse.Namespace) -> None:
    print(table(formats.list_tensors(options.path)))


def _verify(options: argparse.Namespace) -> None:
    checked = formats.load(options.path)
    digest = formats.fingerprint_of(checked)
    if options.fingerprint and not formats.has_fingerprint(checked, options.fingerprint):
        raise ValueError(f"{options.path} has fingerprint {digest}, not {options.fingerprint}")
    print(
        f"ok: {options.path}, {checked.format}, {len(checked.tree)} tensors, fingerprint {digest}"
    )


def _convert(options: argparse.Namespace) -> None:
    config = None
    if options.modules is not None and not options.quantize:
        raise ValueError(f"--modules {options.modules!r} needs --quantize")
    if options.quantize:
        config = QuantConfig(
            quant_type=options.quantize,
            blocksize=options.blocksize,
            compress_statistics=not options.plain,
            skip=(*(() if options.quantize_head else (HEAD,)), *options.skip),
        )
    progress = False if options.quiet else None
    run = stacked.run_of(Path(options.source)) if options.to != "orbax" else None
    if run is not None and config is None:
        _write_model(options, stacked.of_run(run), run / "adapter")
        return
    loaded = formats.load(options.source, config, progress, options.modules)
    found = None
    if loaded.format == "orbax" and loaded.config is None and options.to != "orbax":
        found = stacked.find_model(Path(options.source), loaded.tree)
    if options.config:
        loaded = dataclasses.replace(loaded, config=read_json(Path(options.config)))
    if found is not None and loaded.config is not None:
        entries = loaded.config
        del loaded  # so that one copy of the arrays is in memory
        _write_model(options, stacked.as_model(found, entries, options.alpha, options.rslora))
        return
    if found is not None and (options.to == "huggingface" or found.ranks):
        raise ValueError(
            f"{options.source} has no config.json, which {options.target} would need: pass --config"
            + (" and, for its adapters, --alpha" if found.ranks else "")
        )
    if options.to == "bitsandbytes":
        loaded = dataclasses.replace(loaded, tree=stacked.unstacked(loaded.tree))
    formats.write(loaded, options.target, options.to, options.quant_storage)
    print(f"{options.target}: {options.to}, {len(loaded.tree)} tensors")


def _write_model(options: argparse.Namespace, model: Llama, tokenizer: Path | None = None) -> None:
    count = stacked.write_model(model, options.target, options.to, options.quant_storage, tokenizer)
    print(f"{options.target}: {options.to}, {count} tensors")
