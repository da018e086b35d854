"""The tokenizer files of a Hugging Face directory."""

import os
import tempfile
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    *("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"),
)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files of a tokenizer by name.

    Args:
      tokenizer: a directory that holds them, a tokenizer of transformers, or a
        `tokenizers.Tokenizer`.

    Raises:
      FileNotFoundError: the directory holds no tokenizer.
      TypeError: `tokenizer` is none of these.
    """
    if isinstance(tokenizer, str | os.PathLike):
        folder = Path(tokenizer)
        files = [folder / name for name in TOKENIZER_FILES]
        found = {file.name: file.read_bytes() for file in files if file.is_file()}
        if not found:
            raise FileNotFoundError(f"tokenizer: {folder} has none of {', '.join(TOKENIZER_FILES)}")
        return found
    with tempfile.TemporaryDirectory() as new:
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(new)
        elif hasattr(tokenizer, "save"):
            tokenizer.save(os.path.join(new, "tokenizer.json"))
        else:
            raise TypeError(
                "tokenizer must be a directory, a tokenizer of transformers or a "
                f"tokenizers.Tokenizer, got {type(tokenizer).__name__}"
            )
        return {file.name: file.read_bytes() for file in Path(new).iterdir() if file.is_file()}
