"""What a finished run leaves: the adapter that is shipped, with its tokenizer and model card."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from q4jax.finetune.base import Base
from q4jax.finetune.folder import RunFolder
from q4jax.finetune.settings import Settings
from q4jax.interop import peft
from q4jax.interop.huggingface.tokenizer import tokenizer_files
from q4jax.models.decoder.decoder import Llama


def write_adapter(
    folder: RunFolder, model: Llama, base: Base, settings: Settings, numbers: Mapping[str, Any]
) -> None:
    """Write the adapter in PEFT's format, the tokenizer beside it, and a model card.

    The directory appears whole; it replaces that of the same run.
    """
    new = folder.adapter.with_name(f"{folder.adapter.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    peft.save_adapters(model, new, base_model=base.name, revision=base.revision)
    source = base.folder if base.folder is not None else base.tokenizer.tokenizer
    for name, content in tokenizer_files(source).items():
        (new / name).write_bytes(content)
    (new / "README.md").write_text(model_card(base, settings, numbers), encoding="utf-8")
    shutil.rmtree(folder.adapter, ignore_errors=True)
    os.replace(new, folder.adapter)


def model_card(base: Base, settings: Settings, numbers: Mapping[str, Any]) -> str:
    """Return the text of the adapter's README.md, as the hub shows it."""
    measured = {n: value for n, value in numbers.items() if isinstance(value, int | float)}
    rows = [(name.replace("_", " "), f"{value:.5g}") for name, value in measured.items()]
    data = ", ".join(Path(path).name for path in settings.data)
    made = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "steps": settings.steps,
        "rows of a step": settings.batch,
        "tokens of a row": settings.length,
        "learning rate": settings.learning_rate,
        "base": "as it was" if base.is_quantized else f"{settings.quant_type} in 4 bits",
        "data": data or "in memory",
    }
    head = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora, qlora, q4jax]"]
    if base.name is not None:
        head.insert(0, f"base_model: {json.dumps(base.name)}")
    name = base.name or "a language model"
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# A LoRA adapter of {name}",
            "",
            "It was trained with QLoRA by q4jax; the base's weights were frozen in 4 bits.",
            "",
            *_table(("measured", "value"), rows),
            "",
            *_table(("setting", "value"), [(key, str(value)) for key, value in made.items()]),
            "",
        ]
    )


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {a} | {b} |" for a, b in (head, ("---", "---"), *rows)]
