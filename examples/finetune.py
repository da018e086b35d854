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

SETTINGS: dict[str, Any] = {"steps": 40, "length": 128, "rank": 8, "learning_rate": 1e-3}
SETTINGS |= {"prompt": "To be, or not to be", "check_restore": True}
# The model is small: it takes more steps, at a higher rate, in little memory.
OF_DEMO: dict[str, Any] = {"steps": 150, "batch": 8, "rank": 16, "learning_rate": 5e-3}
OF_DEMO |= {"dense_baseline": True, "no_remat": True, "new_tokens": 96}
OF_DEMO |= {"eval_length": 256, "eval_rows": 32, "eval_every": 50}


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
