"""`python -m q4jax generate` and `chat`: text from a model, as it comes."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from q4jax.cli.open_model import Opened, add_quantize, open_model, quantization
from q4jax.finetune.settings import SettingsError
from q4jax.finetune.tokens import Tokenizer
from q4jax.models.decoder.decoder import Llama
from q4jax.models.generation.generate import generate
from q4jax.models.generation.sampling import Sampling

# Tokens that end a turn, which some models' files do not list.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>")
_LEAVE, _RESET = "/exit", "/reset"

CHAT = f"""Talk to a model in the terminal, with its tokenizer's chat template.

{_RESET} begins a new conversation; {_LEAVE} or Ctrl-D leaves. Ctrl-C stops an answer."""


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    _add_common(parser, tokens=128)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.set_defaults(run=run_generate)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add the options of `chat`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_common(parser, tokens=1024)
    parser.add_argument("--system", help="the first message, which tells the model how to answer")
    parser.set_defaults(run=run_chat)


def _add_common(parser: argparse.ArgumentParser, tokens: int) -> None:
    add = parser.add_argument
    add("model", help="a Hugging Face directory, org/name on the hub, or a run of finetune")
    add("--adapter", metavar="DIR", help="a PEFT adapter of the model")
    add("--max-new-tokens", type=int, default=tokens, metavar="N", help=f"default: {tokens}")
    add("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token")
    add("--top-k", type=int, metavar="N", help="sample from this many tokens only")
    add("--top-p", type=float, metavar="X", help="sample from tokens of this probability only")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling")
    add("--quiet", action="store_true", help="no figures on stderr")
    add_quantize(parser)


class Writer:
    """Writes the text of one row as its tokens come."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""
        self.times: list[float] = []

    def __call__(self, tokens: np.ndarray) -> None:
        """Take the next token, `[1]`."""
        self.times.append(time.perf_counter())
        self.tokens.append(int(tokens[0]))
        text = self._tokenizer.decode(self.tokens)
        if not text.endswith("\ufffd"):  # an incomplete character
            sys.stdout.write(text[len(self.text) :])
            sys.stdout.flush()
            self.text = text


def _settings(options: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `generate`, checked before anything is loaded."""
    found = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    try:
        Sampling.from_arguments(**found, vocab_size=vocab_size)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise SettingsError(f"--{name.replace('_', '-')} {rest}") from None
    if options.max_new_tokens < 1:
        raise SettingsError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.seed < 2**32:
        raise SettingsError(f"--seed must be from 0 to 2**32-1, got {options.seed}")
    return {**found, "rng": jax.random.key(options.seed)}


def _room(opened: Opened, prompt: np.ndarray, options: argparse.Namespace) -> int:
    """Return how many tokens the context has room for, up to `--max-new-tokens`."""
    context = opened.config.context_length
    if not prompt.size:
        raise SettingsError("the prompt has no tokens")
    if prompt.size >= context:
        raise SettingsError(
            f"the prompt has {prompt.size} tokens, the model's context is {context}"
        )
    return int(min(options.max_new_tokens, context - prompt.size))


def _write(
    model: Llama, tokenizer: Tokenizer, prompt: np.ndarray, count: int, **settings: Any
) -> Writer:
    writer = Writer(tokenizer)
    generate(model, [prompt.tolist()], count, callback=writer, **settings)
    return writer


def _pace(times: Sequence[float], began: float) -> str:
    """How fast tokens came that were written at these times, in seconds.

    The first one waits for the compilation of the prompt's program, the second for that of the
    others' program.
    """
    if len(times) < 3:
        return f"{len(times)} tokens after {times[-1] - began:.1f} s, of which most compiled"
    rate = (len(times) - 2) / (times[-1] - times[1])
    return (
        f"{len(times)} tokens; the first two after {times[1] - began:.1f} s, which compile, then "
        f"{rate:.1f} tokens/s"
    )


def run_generate(options: argparse.Namespace) -> None:
    """Continue a prompt."""
    opened = open_model(options.model, options.adapter)
    settings, config = _settings(options, opened.config.vocab_size), quantization(options, opened)
    tokenizer = opened.tokenizer()
    prompt = tokenizer.encode(options.prompt)
    count = _room(opened, prompt, options)
    settings["eos_token_id"] = opened.stops(tokenizer) or None
    model = opened.load(config)
    began = time.perf_counter()
    sys.stdout.write(options.prompt)
    writer = _write(model, tokenizer, prompt, count, **settings)
    print()
    if not options.quiet:
        print(_pace(writer.times, began), file=sys.stderr)


def run_chat(options: argparse.Namespace) -> None:
    """Answer messages until there are no more."""
    opened = open_model(options.model, options.adapter)
    settings, config = _settings(options, opened.config.vocab_size), quantization(options, opened)
    tokenizer = opened.tokenizer()
    template = tokenizer.chat
    ends = [tokenizer.tokenizer.token_to_id(text) for text in _ENDS]
    stops = {*opened.stops(tokenizer), *(end for end in ends if end is not None)}
    settings["eos_token_id"] = sorted(stops) or None
    start = [] if options.system is None else [{"role": "system", "content": options.system}]
    template.render([*start, {"role": "user", "content": "?"}], answer=True)  # it may refuse
    model, messages = opened.load(config), list(start)
    while (text := _ask()) is not None:
        if text == _RESET:
            messages = list(start)
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            prompt = tokenizer.encode(template.render(asked, answer=True), special=False)
            count = _room(opened, prompt, options)
        except SettingsError as error:
            print(f"q4jax: {error}; {_RESET} begins a new conversation", file=sys.stderr)
            continue
        writer = Writer(tokenizer)
        with contextlib.suppress(KeyboardInterrupt):
            generate(model, [prompt.tolist()], count, callback=writer, **settings)
        print()
        messages = [*asked, {"role": "assistant", "content": writer.text}]


def _ask() -> str | None:
    """Return the next message; None at the end."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if text:
            return None if text == _LEAVE else text
