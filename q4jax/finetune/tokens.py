"""The tokenizer of a model, and documents as tokens."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from q4jax.finetune.chat import ChatTemplate
from q4jax.finetune.documents import Document, Piece
from q4jax.finetune.requirements import require
from q4jax.finetune.settings import SettingsError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class Tokens(NamedTuple):
    """A document as tokens.

    Attributes:
      ids: int32 `[T]`.
      learned: bool `[T]`, whether the loss counts the token.
    """

    ids: np.ndarray
    learned: np.ndarray


class Tokenizer:
    """A `tokenizers.Tokenizer` with what `tokenizer_config.json` says of it.

    Args:
      tokenizer: the tokenizer.
      config: the content of `tokenizer_config.json`.
      template: the chat template; None: the config's, where it has one.
    """

    def __init__(
        self, tokenizer: Any, config: dict[str, Any] | None = None, template: str | None = None
    ):
        self.tokenizer = tokenizer
        config = {} if config is None else config
        self.special = {n: t for n in _SPECIAL if (t := _text(config.get(n))) is not None}
        self._source = _template(config) if template is None else template
        self._chat: ChatTemplate | None = None

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face directory.

        Raises:
          SettingsError: the directory has no `tokenizer.json` (the message says how to make one of
            another form of tokenizer), or a file is malformed.
        """
        tokenizers = require("tokenizers", "finetune", "a model's text needs its tokenizer")
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise SettingsError(f"--model: there is no {file}{_advice(folder)}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises plain ones
            raise SettingsError(f"--model: {file} is malformed: {error}") from None
        config, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            entries = json.loads(config.read_text("utf-8")) if config.is_file() else {}
            source = template.read_text("utf-8") if template.is_file() else None
        except ValueError as error:
            raise SettingsError(
                f"--model: {folder}: a tokenizer file is no JSON: {error}"
            ) from None
        if not isinstance(entries, dict):
            raise SettingsError(f"--model: {config} must be an object")
        return cls(tokenizer, entries, source)

    @property
    def chat(self) -> ChatTemplate:
        """The chat template; SettingsError if there is none."""
        if self._source is None:
            raise SettingsError("messages need a chat template, and the model's tokenizer has none")
        if self._chat is None:
            self._chat = ChatTemplate(self._source, self.special)
        return self._chat

    @property
    def eos(self) -> int | None:
        """The token that ends a document, or None."""
        text = self.special.get("eos_token")
        return None if text is None else self.tokenizer.token_to_id(text)

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Return the tokens of a text, int32 `[T]`, with those that the tokenizer adds or not."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=special).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self.tokenizer.decode([int(token) for token in ids]))

    def documents(self, found: Iterable[Document], vocab_size: int) -> list[Tokens]:
        """Return documents as tokens.

        A text and a completion end with the token `eos`, which is learned; a conversation ends as
        its template says.

        Raises:
          SettingsError: the template refuses a conversation, or a token is not in the model's
            vocabulary; the message has the file and the line.
        """
        tokens = []
        for document in found:
            try:
                tokens += self._tokens(document)
                _check(tokens[-1], vocab_size)
            except (SettingsError, UnicodeError, TypeError) as error:
                raise SettingsError(f"{document.where}: {error}") from None
        return tokens

    def _tokens(self, document: Document) -> list[Tokens]:
        if document.messages is None:
            return [self._encode(document.pieces, special=True, end=self.eos)]
        parts = self.chat.documents(document.messages, document.tools)
        return [self._encode(pieces, special=False, end=None) for pieces in parts]

    def _encode(self, pieces: tuple[Piece, ...], special: bool, end: int | None) -> Tokens:
        """Encode the pieces as one text; a token belongs to the piece of its last character."""
        text = "".join(piece.text for piece in pieces)
        text.encode()  # JSON may hold halves of characters, which the tokenizer does not name
        encoding = self.tokenizer.encode(text, add_special_tokens=special)
        ids = list(encoding.ids)
        ends = np.cumsum([len(piece.text) for piece in pieces])
        flags = np.array([piece.learned for piece in pieces])
        first, last = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        # The piece of a token's last character; special tokens of the tokenizer have none.
        place = np.searchsorted(ends, np.maximum(last, 1) - 1, side="right")
        learned = flags[np.minimum(place, len(pieces) - 1)] & (last > first)
        if end is not None:
            if not ids or ids[-1] != end:
                ids, learned = [*ids, end], np.append(learned, False)
            learned[-1] = flags[-1]
        return Tokens(np.array(ids, np.int32), learned.astype(bool))


def _advice(folder: Path) -> str:
    """Return how to make a `tokenizer.json` of the form of tokenizer that a directory has."""
    other = next((n for n in ("tokenizer.model", "vocab.json") if (folder / n).is_file()), None)
    if other is None:
        return ""
    packages = "transformers sentencepiece protobuf" if other != "vocab.json" else "transformers"
    return (
        f', only {other}: make it of that file with `pip install {packages}` and `python -c "from '
        f"transformers import AutoTokenizer as A; A.from_pretrained('{folder}')"
        f".save_pretrained('{folder}')\"`"
    )


def _check(tokens: Tokens, vocab_size: int) -> None:
    if tokens.ids.size and tokens.ids.max() >= vocab_size:
        raise SettingsError(
            f"the tokenizer has token {tokens.ids.max()}, the model has {vocab_size} tokens"
        )


def _text(token: Any) -> str | None:
    """Return a special token, which is a text or an object with one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _template(config: dict[str, Any]) -> str | None:
    """Return the chat template of a config: a text, or of several the default."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
