"""Files of documents, and what is wrong with them."""

import pytest

from q4jax.finetune import Document, Piece, SettingsError, read_documents
from q4jax.finetune.split import split


def test_text_and_json_lines_are_read_in_order(tmp_path, lines):
    (tmp_path / "a.txt").write_text("A poem.\n")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file = lines({"text": "One"}, {"prompt": "2 + 2 =", "completion": " 4"}, {"messages": messages})
    found = read_documents([str(tmp_path / "a.txt"), file])
    assert [document.pieces for document in found] == [
        (Piece("A poem.\n", True),),
        (Piece("One", True),),
        (Piece("2 + 2 =", False), Piece(" 4", True)),
        (),
    ]
    assert found[3].messages == tuple(messages)
    assert found[3].where == f"--data: {file}, line 3"
    assert [document.is_file for document in found] == [True, False, False, False]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON: Expecting property name"),
        ("[" * 100_000, "line 2 is no JSON: maximum recursion depth"),
        ("[]", "line 2 must be an object with text, prompt and completion, or messages"),
        ('{"txt": "a"}', r"line 2 must have text, .* got \['txt'\]"),
        ('{"prompt": "a"}', r"line 2 must have .* got \['prompt'\]"),
        ('{"completion": "a"}', r"line 2 must have .* got \['completion'\]"),
        ('{"text": "a", "completion": "b"}', r"got \['completion', 'text'\]"),
        ('{"text": ""}', "line 2: text must be a text that is not empty"),
        ('{"prompt": 3, "completion": "a"}', "line 2: prompt must be a text"),
        ('{"messages": "Hi"}', "line 2: messages must be a list of objects"),
        ('{"messages": [{"role": "robot", "content": "Hi"}]}', "role of message 0 must be one of"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content of message 0 must be a text"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "has no assistant to learn from"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(SettingsError, match=message) as error:
        read_documents([str(file)])
    assert str(error.value).startswith(f"--data: {file}, line 2")
    assert "\n" not in str(error.value)


def test_a_wrong_file_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    cases = {
        "nowhere": "No such file or directory",
        ".": "Is a directory",
        "empty.txt": "is empty",
        "table.csv": "documents are text or JSON lines, in a file named .jsonl",
        "binary.txt": "is no UTF-8 text: .*byte 0xff",
    }
    for name, message in cases.items():
        with pytest.raises(SettingsError, match=f"--eval-data: .*{message}"):
            read_documents([str(tmp_path / name)], "--eval-data")
    with pytest.raises(SettingsError, match="--data names no document"):
        read_documents([])


def document(text, is_file=False):
    return Document(f"line {text}", (Piece(text, True),), is_file=is_file)


def test_documents_are_held_out_whole_and_texts_in_part():
    found = [*(document(str(number)) for number in range(10)), document("0123456789", True)]
    train, held_out = split(found, 0.2, seed=1)
    texts = [[d.pieces[0].text for d in part] for part in (train, held_out)]
    assert len(texts[0]) == 8 + 1
    assert len(texts[1]) == 2 + 1
    assert sorted(texts[0][:8] + texts[1][:2]) == [str(number) for number in range(10)]
    assert (texts[0][8], texts[1][2]) == ("01234567", "89")
    assert split(found, 0.2, seed=1) == (train, held_out)
    assert split(found, 0.2, seed=2) != (train, held_out)
    assert split(found, 0.0, seed=1) == (found, [])


def test_one_line_cannot_be_held_out():
    with pytest.raises(SettingsError, match="line 1 is the only document of its kind"):
        split([document("1")], 0.1, seed=0)
