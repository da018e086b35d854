"""Documents as tokens: what is learned, the end, and tokens that the model has not."""

import json
import shutil

import numpy as np
import pytest

from q4jax.finetune import Document, Piece, SettingsError, Tokenizer
from tests.support import tiny_hub_model

VOCAB = 264


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny_hub_model.byte_tokenizer(), tiny_hub_model.tokenizer_config())


def tokens_of(tokenizer, *pieces, **entries):
    pieces = tuple(Piece(*piece) for piece in pieces)
    return tokenizer.documents([Document("here", pieces, **entries)], VOCAB)


def text_of(tokenizer, tokens, learned):
    ids = tokens.ids[tokens.learned == learned].tolist()
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_completion_is_learned_and_ends(tokenizer):
    [tokens] = tokens_of(tokenizer, ("2 + 2 =", False), (" 4é", True))
    assert text_of(tokenizer, tokens, False) == "2 + 2 ="
    assert text_of(tokenizer, tokens, True) == " 4é</s>"
    assert tokens.ids[-1] == tokenizer.eos == 257


def test_of_a_conversation_the_answers_are_learned(tokenizer):
    talk = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
    [tokens] = tokens_of(tokenizer, messages=talk)
    assert text_of(tokenizer, tokens, False) == "<s><|user|>Hi</s>\n<|assistant|>"
    assert text_of(tokenizer, tokens, True) == "Hello</s>\n"


def test_what_the_tokenizer_adds_is_not_learned_but_the_end(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tiny_hub_model.byte_tokenizer()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    adding = Tokenizer(inner, tiny_hub_model.tokenizer_config())
    [tokens] = tokens_of(adding, ("ab", True))
    assert tokens.ids[[0, -1]].tolist() == [256, 257]
    assert tokens.learned.tolist() == [False, True, True, True]
    assert adding.encode("ab").size == 4
    assert adding.encode("ab", special=False).size == 2


def test_a_token_belongs_to_the_piece_of_its_last_character():
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    tokenizer = Tokenizer(tokenizers.Tokenizer(model))
    assert tokenizer.eos is None
    [tokens] = tokens_of(tokenizer, ("aa", False), ("bb", True))
    assert (tokens.ids.tolist(), tokens.learned.tolist()) == ([0, 2, 1], [False, True, True])


def test_decode_leaves_special_tokens_out(tokenizer):
    assert tokenizer.decode(np.append(tokenizer.encode("Hé"), 257)) == "Hé"


def test_what_cannot_be_encoded_is_named(tokenizer):
    with pytest.raises(SettingsError, match="here: the tokenizer has token 257, the model has 257"):
        tokenizer.documents([Document("here", (Piece("a", True),))], 257)
    with pytest.raises(SettingsError, match="here: .*surrogate"):
        tokens_of(tokenizer, ("\ud800", True))
    talk = ({"role": "assistant", "content": "Hello"},)
    plain = Tokenizer(tiny_hub_model.byte_tokenizer())
    with pytest.raises(SettingsError, match="here: messages need a chat template, and the model's"):
        tokens_of(plain, messages=talk)


def test_the_files_of_a_directory(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    assert Tokenizer.load(folder).special == {"bos_token": "<s>", "eos_token": "</s>"}
    templates = [{"name": "other", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.load(folder).chat.render([]) == "yes"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(folder).chat.render([]) == "file"
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(SettingsError, match=r"tokenizer_config.json must be an object"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"a tokenizer file is no JSON"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"--model: .*tokenizer.json is malformed"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SettingsError, match=r"--model: there is no .*tokenizer.json$"):
        Tokenizer.load(folder)
    for other, packages in (
        ("vocab.json", "transformers`"),
        ("tokenizer.model", "transformers sentencepiece protobuf`"),
    ):
        (folder / other).write_bytes(b"")
        with pytest.raises(
            SettingsError, match=rf"tokenizer.json, only {other}: .*{packages}"
        ) as e:
            Tokenizer.load(folder)
        assert f"A.from_pretrained('{folder}')" in str(e.value) and "\n" not in str(e.value)
