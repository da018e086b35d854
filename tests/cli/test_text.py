"""`python -m q4jax generate` and `chat`."""

import io
import json
import re
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from q4jax.cli import text
from q4jax.interop import peft
from q4jax.models import from_pretrained, generate

pytest.importorskip("tokenizers")

from q4jax.finetune.tokens import Tokenizer

PROMPT = "To be, or not"


def expected(folder, adapter=None, prompt=PROMPT, count=12):
    model = from_pretrained(folder)
    model = model if adapter is None else peft.load_adapters(model, adapter)
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(prompt)
    found = generate(model, jnp.asarray(ids)[None], count, eos_token_id=tokenizer.eos)
    new = np.asarray(found[0])[ids.size :].tolist()
    return tokenizer.decode(new[: new.index(tokenizer.eos)] if tokenizer.eos in new else new)


def test_a_prompt_is_continued(run, tiny, adapter):
    arguments = ["generate", tiny, "--prompt", PROMPT, "--max-new-tokens", 12]
    code, plain, err = run(*arguments)
    assert (code, plain.rstrip("\ufffd\n")) == (0, (PROMPT + expected(tiny)).rstrip("\ufffd"))
    assert re.search(
        r"12 tokens; the first two after [\d.]+ s, which compile, then [\d.]+ tok", err
    )
    code, adapted, err = run(*arguments, "--adapter", adapter, "--quiet")
    wanted = PROMPT + expected(tiny, adapter)
    assert (code, adapted.rstrip("\ufffd\n"), err) == (0, wanted.rstrip("\ufffd"), "")
    assert adapted != plain
    code, quantized, _ = run(*arguments, "--quantize", "nf4")
    assert (code, quantized.startswith(PROMPT)) == (0, True)


def test_text_comes_with_its_tokens(monkeypatch, run, tiny):
    """The first token is written before the second is computed."""
    events = []
    real = text.Writer.__call__

    def note(writer, tokens):
        before = len(writer.text)
        real(writer, tokens)
        events.append((len(writer.tokens), len(writer.text) - before))

    monkeypatch.setattr(text.Writer, "__call__", note)
    run("generate", tiny, "--prompt", PROMPT, "--max-new-tokens", 6)
    assert [number for number, _ in events] == [1, 2, 3, 4, 5, 6]
    assert sum(size > 0 for _, size in events) > 1


def test_sampling_depends_on_the_seed(run, tiny):
    arguments = ["generate", tiny, "--prompt", PROMPT, "--temperature", 2, "--max-new-tokens", 9]
    first, again, other = (run(*arguments, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--temperature", "-1"], "--temperature must be at least 0 and finite, got -1.0"),
        (["--top-k", "999"], "--top-k must be from 0 to vocab_size=264, got 999"),
        (["--top-p", "2"], "--top-p must be above 0 and at most 1, got 2.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--max-new-tokens", "x"], "argument --max-new-tokens: invalid int value: 'x'"),
        (["--seed", "-1"], "--seed must be from 0 to 2**32-1, got -1"),
        (["--prompt", ""], "the prompt has no tokens"),
        (["--prompt", "x" * 128], "the prompt has 128 tokens, the model's context is 128"),
        (["--adapter", "/nowhere"], "/nowhere is no PEFT adapter: it has no adapter_config.json"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_a_wrong_option_is_one_line(monkeypatch, run, tiny, change, message):
    monkeypatch.setattr("q4jax.cli.open_model.from_pretrained", lambda *_: pytest.fail("loaded"))
    code, out, err = run("generate", tiny, "--prompt", PROMPT, *change)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_a_wrong_model_is_one_line(run, tiny, tmp_path):
    code, _, err = run("generate", "/nowhere", "--prompt", PROMPT)
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no directory /nowhere, and models of the hub are org/name" in err
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "t5"}')
    code, _, err = run("generate", tmp_path / "m", "--prompt", PROMPT)
    assert (code, "model_type 't5'" in err, err.count("\n")) == (2, True, 1)
    (tmp_path / "m" / "config.json").write_text("{")
    code, _, err = run("generate", tmp_path / "m", "--prompt", PROMPT)
    assert (code, "config.json is no JSON" in err, err.count("\n")) == (2, True, 1)


def chat(monkeypatch, run, folder, *lines, options=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run("chat", folder, "--max-new-tokens", 5, *options)


def test_a_conversation_grows(monkeypatch, run, tiny):
    pytest.importorskip("jinja2")
    prompts = []
    real = text.generate

    def note(model, ids, count, **settings):
        prompts.append(Tokenizer.load(tiny).tokenizer.decode(ids[0], skip_special_tokens=False))
        return real(model, ids, count, **settings)

    monkeypatch.setattr(text, "generate", note)
    options = ("--system", "Be brief.")
    code, out, err = chat(
        monkeypatch, run, tiny, "Hi", "", "And?", "/reset", "Again", "/exit", "x", options=options
    )
    assert (code, err, out.count("\n") >= 3) == (0, "", True)
    start = "<s><|system|>Be brief.</s>\n<|user|>"
    assert prompts[0] == f"{start}Hi</s>\n<|assistant|>"
    assert prompts[1].startswith(prompts[0])
    assert prompts[1].endswith("</s>\n<|user|>And?</s>\n<|assistant|>")
    assert prompts[2:] == [f"{start}Again</s>\n<|assistant|>"]


def test_a_message_that_is_too_long_is_refused(monkeypatch, run, tiny):
    pytest.importorskip("jinja2")
    code, out, err = chat(monkeypatch, run, tiny, "x" * 200)
    assert (code, out) == (0, "")
    assert "tokens, the model's context is 128; /reset begins a new" in err


def test_a_model_without_a_template_is_refused(monkeypatch, run, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    code, _, err = chat(monkeypatch, run, tmp_path / "m", "Hi")
    assert (code, err.count("\n")) == (2, 1)
    assert "chat template, and the model's tokenizer has none" in err


@pytest.mark.parametrize(
    ("times", "pace"),
    [
        ([11.5], "1 tokens after 1.5 s, of which most compiled"),
        ([11.0, 13.0], "2 tokens after 3.0 s, of which most compiled"),
        (
            [11.0, 13.0, 13.5, 14.0],
            "4 tokens; the first two after 3.0 s, which compile, then 2.0 tokens/s",
        ),
    ],
)
def test_the_pace_is_without_what_compiles(times, pace):
    assert text._pace(times, 10.0) == pace
