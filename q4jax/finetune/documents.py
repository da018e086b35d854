"""Documents: pieces of text, some of which the model learns to write."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from q4jax.finetune.settings import SettingsError

_FORMS = "text, prompt and completion, or messages"
_ROLES = ("system", "user", "assistant", "tool", "developer")


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
      text: its characters.
      learned: whether the loss counts its tokens.
    """

    text: str
    learned: bool


class Document(NamedTuple):
    """A text, or a conversation that a chat template makes one of.

    Attributes:
      where: the file and line, for errors.
      pieces: the parts in order; of a conversation: empty.
      messages: the conversation, or None.
      tools: what the entry of the same name says, for the template, or None.
      is_file: whether it is a whole file of text.
    """

    where: str
    pieces: tuple[Piece, ...]
    messages: tuple[dict[str, Any], ...] | None = None
    tools: Any = None
    is_file: bool = False


def read_documents(paths: Sequence[str], option: str = "--data") -> list[Document]:
    """Read files of documents: JSON lines where the name ends so, else one text each.

    Raises:
      SettingsError: a file is missing, is no UTF-8, is empty or malformed; the message has the
        option, the file, and the number of the line.
    """
    found = [document for path in paths for document in _read(Path(path), option)]
    if not found:
        raise SettingsError(f"{option} names no document")
    return found


def _read(path: Path, option: str) -> Iterator[Document]:
    where = f"{option}: {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{where} is no UTF-8 text: {error}") from None
    if not text.strip():
        raise SettingsError(f"{where} is empty")
    if path.suffix in (".json", ".parquet", ".csv"):
        raise SettingsError(f"{where}: documents are text or JSON lines, in a file named .jsonl")
    if path.suffix != ".jsonl":
        yield Document(where, (Piece(text, True),), is_file=True)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse(line, f"{where}, line {number}")


def _parse(line: str, where: str) -> Document:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where} is no JSON: {error}") from None
    if not isinstance(entry, dict):
        raise SettingsError(f"{where} must be an object with {_FORMS}")
    forms = [form for form in ("text", "completion", "messages") if form in entry]
    if len(forms) != 1 or ("prompt" in entry) != (forms == ["completion"]):
        raise SettingsError(f"{where} must have {_FORMS}, got {sorted(entry)}")
    if forms == ["messages"]:
        return Document(where, (), _messages(entry["messages"], where), entry.get("tools"))
    names = ["text"] if forms == ["text"] else ["prompt", "completion"]
    for name in names:
        if not isinstance(entry[name], str) or (name != "prompt" and not entry[name]):
            raise SettingsError(f"{where}: {name} must be a text that is not empty")
    return Document(where, tuple(Piece(entry[name], name != "prompt") for name in names))


def _messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise SettingsError(f"{where}: messages must be a list of objects")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise SettingsError(
                f"{where}: the role of message {number} must be one of {', '.join(_ROLES)}, got "
                f"{role!r}"
            )
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise SettingsError(f"{where}: the content of message {number} must be a text")
    if not any(message["role"] == "assistant" for message in messages):
        raise SettingsError(f"{where}: messages has no assistant to learn from")
    return tuple(messages)
