"""The command line of `finetune.py`."""

import argparse
from pathlib import Path


def parse_arguments(description: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    add = parser.add_argument
    add("--model", type=_absolute, help="Hugging Face directory, instead of SmolLM2-135M")
    add("--data", type=_absolute, help="UTF-8 text, instead of Shakespeare; a tenth is held out")
    add("--out", type=Path, default=Path("finetune-out"), help="folder for the results")
    add("--resume", action="store_true", help="continue the run in --out with its settings")
    add("--mesh", help="device mesh with axes data, fsdp and tensor, such as fsdp=4,tensor=2")
    add("--distributed", action="store_true", help="run as one of several processes on a cluster")
    add("--steps", type=_positive, default=40, help="optimizer steps")
    add("--batch", type=_positive, default=4, help="text windows per step")
    add("--length", type=_positive, default=128, help="tokens per window")
    add("--rank", type=_positive, default=8, help="rank of the adapters")
    add("--alpha", type=float, default=16.0, help="numerator of the scale alpha / rank")
    add("--learning-rate", type=float, default=1e-3, help="peak learning rate, after warm-up")
    add("--quant-type", choices=("nf4", "fp4"), default="nf4", help="4-bit data type")
    add("--blocksize", type=int, default=64, help="number of weights that share a scale")
    add("--no-double-quant", action="store_true", help="keep the scales in float32")
    add("--save-every", type=_positive, default=20, help="steps between checkpoints")
    add("--eval-every", type=_positive, default=20, help="steps between held-out evaluations")
    add("--eval-windows", type=_positive, default=4, help="held-out windows of 512 tokens")
    add("--prompt", default="HAMLET.\nTo be, or not to be", help="text to continue")
    add("--new-tokens", type=int, default=48, help="number of tokens to generate")
    add("--seed", type=int, default=0, help="random seed of adapters and batches")
    add("--check", type=Path, help=argparse.SUPPRESS)  # internal: the second process
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _absolute(text: str) -> Path:
    return Path(text).expanduser().resolve()


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass
