"""Chat templates: conversations as the text that a model was trained on.

A template is a program that came with a model. It runs in jinja2's sandbox, which keeps it from
attributes of Python and from changing its arguments.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from q4jax.finetune.documents import Piece
from q4jax.finetune.requirements import require
from q4jax.finetune.settings import SettingsError

Messages = Sequence[Mapping[str, Any]]
# Marks of `{% generation %}` in the rendered text; no text of Unicode has these characters.
_BEGIN, _END = "\ufdd0", "\ufdd1"


class ChatTemplate:
    """A chat template and the special tokens that it writes.

    Args:
      source: the template, in the language of jinja2.
      tokens: special tokens by the names that the template has for them, such as `eos_token`.

    Raises:
      SettingsError: jinja2 is not installed, or the template is malformed.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        jinja2 = require("jinja2", "finetune", "messages need a chat template")
        sandbox = require("jinja2.sandbox", "finetune", "messages need a chat template")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.add_extension(_generation_block(jinja2))
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._tokens = dict(tokens)
        self._errors = (jinja2.TemplateError, *_ERRORS)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise SettingsError(f"the chat template is malformed: {error}") from None

    def render(self, messages: Messages, tools: Any = None, *, answer: bool = False) -> str:
        """Return the text of a conversation.

        Args:
          messages: objects with `role` and `content`.
          tools: what the template tells the model of tools, or None.
          answer: whether the text ends where the assistant's next message begins.

        Raises:
          SettingsError: the template refuses the conversation; the message says why.
        """
        return self._marked(messages, tools, answer).replace(_BEGIN, "").replace(_END, "")

    def documents(self, messages: Messages, tools: Any = None) -> list[tuple[Piece, ...]]:
        """Return a conversation as documents in which the assistant's messages are learned.

        A template may mark them itself, by `{% generation %}`. Otherwise they are what follows
        the text up to each of them. Some templates write a message differently once others follow
        (they leave out reasoning). Then each message of the assistant is a document of its own,
        with the conversation before it, as the model sees it when it answers.

        Raises:
          SettingsError: as `render`; or an answer of the assistant does not follow its prompt.
        """
        whole = self._marked(messages, tools, False)
        if _BEGIN in whole:
            return [_marked_pieces(whole)]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        pairs = [self._turn(messages, tools, turn) for turn in turns]
        if all(whole.startswith(prompt + answer) for prompt, answer in pairs):
            return [_pieces(whole, pairs)]
        return [(Piece(prompt, False), Piece(answer, True)) for prompt, answer in pairs]

    def _turn(self, messages: Messages, tools: Any, turn: int) -> tuple[str, str]:
        """Return the text before a message of the assistant, and the message."""
        prompt = self.render(messages[:turn], tools, answer=True)
        both = self.render(messages[: turn + 1], tools)
        if not both.startswith(prompt):
            prompt = self.render(messages[:turn], tools)  # templates without a generation prompt
        if not both.startswith(prompt) or both == prompt:
            raise SettingsError(
                f"the chat template does not write message {turn} after the text of those before it"
            )
        return prompt, both[len(prompt) :]

    def _marked(self, messages: Messages, tools: Any, answer: bool) -> str:
        try:
            return str(
                self._template.render(
                    messages=[dict(message) for message in messages],
                    tools=tools,
                    add_generation_prompt=answer,
                    **self._tokens,
                )
            )
        except self._errors as error:
            raise SettingsError(f"the chat template refuses the conversation: {error}") from None


# What the code of a template may raise beside jinja2's own errors.
_ERRORS = (TypeError, ValueError, KeyError, AttributeError, OverflowError, ArithmeticError)


def _pieces(whole: str, pairs: list[tuple[str, str]]) -> tuple[Piece, ...]:
    pieces, end = [], 0
    for prompt, answer in pairs:
        if len(prompt) > end:
            pieces.append(Piece(whole[end : len(prompt)], False))
        start = max(end, len(prompt))
        end = len(prompt) + len(answer)
        pieces.append(Piece(whole[start:end], True))
    if whole[end:]:
        pieces.append(Piece(whole[end:], False))
    return tuple(pieces)


def _marked_pieces(text: str) -> tuple[Piece, ...]:
    pieces, learned = [], False
    for part in text.replace(_END, _END + _BEGIN).split(_BEGIN):
        learned = part.endswith(_END)
        if part.strip(_END):
            pieces.append(Piece(part.rstrip(_END), learned))
    return tuple(pieces)


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **settings)


def _raise(message: str) -> None:
    raise ValueError(message)


def _generation_block(jinja2: Any) -> Any:
    """Return the extension for `{% generation %}...{% endgeneration %}`."""

    class Generation(jinja2.ext.Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            nodes, line = jinja2.nodes, next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
            return [node.set_lineno(line) for node in (begin, *body, end)]

    return Generation
