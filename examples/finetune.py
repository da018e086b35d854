"""QLoRA end to end: quantize a language model to 4 bits, fine-tune, save, restore and use it.

    python examples/finetune.py                        # a small model, trained first
    python examples/finetune.py --model DIR --data FILE   # any model of docs/models.md, any text
    python examples/finetune.py --out OUT --resume     # continue after Ctrl-C

This is `python -m q4jax finetune` with a model and text of its own, in place of those that
--model and --data name, and with the settings below. `generate.py OUT` continues texts with the
result, and `export.py OUT DIR` merges it into a Hugging Face directory.
"""

from typing import Any

import demo
import pretrain

from q4jax import finetune
from q4jax.cli.finetune import add_options, start
from q4jax.cli.options import Parser, given_settings
from q4jax.finetune.placement import Placement

SETTINGS: dict[str, Any] = {
    "steps": 60,
    "length": 128,
    "batch": 8,
    "rank": 16,
    "learning_rate": 2e-3,
    "prompt": "To be, or not to be",
    "new_tokens": 96,
    "check_restore": True,
}
OF_DEMO = {"dense_baseline": True, "eval_length": 256, "eval_rows": 32, "no_remat": True}


def sources(settings: finetune.Settings) -> dict[str, Any]:
    """Return the model and the documents that the settings do not name."""
    found = {}
    if settings.model is None:
        place = Placement(settings.mesh, settings.blocksize)
        found["base"] = finetune.Base.of_directory(pretrain.folder(), settings, place)
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
        finished = start(given, options, sources) is not None
    except (finetune.SettingsError, RuntimeError) as error:
        parser.error(str(error))
    print("finished" if finished else "stopped and saved; --resume goes on")


if __name__ == "__main__":
    main()
