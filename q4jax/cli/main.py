"""The commands of `python -m q4jax`: inspect, verify and convert checkpoints.

Exit codes: 0 success; 1 the checkpoint is damaged or does not fit (ValueError); 2 wrong command
line; 3 a file is missing or cannot be written; 4 the checkpoint format is not supported.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from q4jax.cli import formats
from q4jax.cli.table import table
from q4jax.convert.config import QuantConfig
from q4jax.core.codebooks import BLOCKSIZES, CODEBOOKS
from q4jax.interop.bitsandbytes.tensors import CONTAINERS
from q4jax.interop.files import read_json

DAMAGED, MISSING, UNSUPPORTED = 1, 3, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code.

    Examples:
      >>> main(["inspect", "/nowhere"])
      3
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m q4jax",
        description="Inspect, verify and convert checkpoints: Hugging Face directories, "
        "bitsandbytes' safetensors files, Orbax checkpoints of q4jax, PEFT adapters.",
        epilog="exit codes: 0 done, 1 the checkpoint is damaged or does not fit, 2 wrong command "
        "line, 3 a file is missing or cannot be written, 4 not supported",
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
    convert.add_argument("--blocksize", type=int, choices=BLOCKSIZES, default=64)
    convert.add_argument("--plain", action="store_true", help="no double quantization")
    convert.add_argument("--skip", action="append", help="a layer to keep dense (lm_head)")
    convert.add_argument("--quant-storage", choices=CONTAINERS, default="uint8")
    convert.add_argument("--config", help="config.json for a Hugging Face directory")
    convert.add_argument("--quiet", action="store_true", help="no progress bar")
    convert.set_defaults(run=_convert)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    print(table(formats.list_tensors(options.path)))


def _verify(options: argparse.Namespace) -> None:
    checked = formats.load(options.path)
    digest = formats.fingerprint_of(checked)
    if options.fingerprint and options.fingerprint != digest:
        raise ValueError(f"{options.path} has fingerprint {digest}, not {options.fingerprint}")
    print(f"{options.path}: {checked.format}, {len(checked.tree)} tensors, fingerprint {digest}")


def _convert(options: argparse.Namespace) -> None:
    config = None
    if options.quantize:
        config = QuantConfig(
            quant_type=options.quantize,
            blocksize=options.blocksize,
            compress_statistics=not options.plain,
            skip=tuple(options.skip or ("lm_head",)),
        )
    loaded = formats.load(options.source, config, progress=False if options.quiet else None)
    if options.config:
        loaded = dataclasses.replace(loaded, config=read_json(Path(options.config)))
    formats.write(loaded, options.target, options.to, options.quant_storage)
    print(f"{options.target}: {options.to}, {len(loaded.tree)} tensors")
