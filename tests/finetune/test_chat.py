"""Chat templates: what is learned of a conversation, and the sandbox."""

import pytest

from q4jax.finetune import ChatTemplate, SettingsError
from tests.support.tiny_hub_model import TEMPLATE

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def learned(pieces):
    return [piece.text for piece in pieces if piece.learned]


def test_the_answers_are_learned_with_their_ends():
    [pieces] = ChatTemplate(TEMPLATE, TOKENS).documents(TALK)
    assert "".join(piece.text for piece in pieces) == (
        "<s><|system|>Be short.</s>\n<|user|>Hi</s>\n<|assistant|>Hello</s>\n<|user|>Bye</s>\n"
        "<|assistant|>So long</s>\n"
    )
    assert learned(pieces) == ["Hello</s>\n", "So long</s>\n"]


def test_a_template_may_mark_what_is_learned():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}\n"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    chat = ChatTemplate(template, {})
    [pieces] = chat.documents(TALK)
    whole = "Be short.\nHi\nA: Hello\nBye\nA: So long\n"
    assert "".join(piece.text for piece in pieces) == whole
    assert learned(pieces) == ["Hello\n", "So long\n"]
    assert chat.render(TALK) == whole


def test_an_answer_that_is_rewritten_later_is_a_document_of_its_own():
    """As of templates that leave out the reasoning of earlier answers."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}"
        "<think></think>{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    first, second = ChatTemplate(template, {}).documents(TALK[1:])
    assert [piece.text for piece in first] == ["[user]Hi[assistant]", "<think></think>Hello"]
    assert [piece.text for piece in second] == [
        "[user]Hi[assistant]Hello[user]Bye[assistant]",
        "<think></think>So long",
    ]


def test_tools_and_special_tokens_reach_the_template():
    chat = ChatTemplate("{{ bos_token }}{{ tools | tojson }}{{ messages[0].content }}", TOKENS)
    assert chat.render([{"role": "user", "content": "é"}], [{"a": "ü"}]) == '<s>[{"a": "ü"}]é'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template is malformed: "),
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation: can only concatenate str"),
        ("{{ nothing.there }}", "refuses the conversation: 'nothing' is undefined"),
        ("{{ 1 // 0 }}", "refuses the conversation: integer division"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' .* is unsafe"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe|refuses"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_wrong_template_is_one_line(template, message):
    with pytest.raises(SettingsError, match=message) as error:
        ChatTemplate(template, {}).documents(TALK)
    assert "\n" not in str(error.value)


def test_a_template_that_drops_the_answer_is_refused():
    with pytest.raises(SettingsError, match="does not write message 2 after the text of those bef"):
        ChatTemplate("{{ messages[-1].content }}", {}).documents(TALK)
