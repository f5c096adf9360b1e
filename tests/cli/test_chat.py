"""A conversation: what is kept of it, what an interrupted answer leaves, what can be typed."""

from __future__ import annotations

import _thread
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from airstream import ArgumentError, UnsupportedError
from airstream.cli import main
from airstream.cli.chat import COMMANDS, obey
from airstream.cli.conversation import Conversation
from airstream.cli.encoding import encode_chat
from airstream.cli.reading import typed
from airstream.compat.traits import cut_back
from tests.conftest import WriteTiny, stream
from tests.stand_ins.tiny_models import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def with_template(source: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """The checkpoint in `source` with a chat template, in `folder`."""
    for file in source.iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny: WriteTiny, tmp_path: Path) -> Path:
    return with_template(tiny("llama", torch.float32), tmp_path)


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with stream(folder) as model:
        yield model


class Impatient:
    """Presses Ctrl-C once there are so many tokens."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:
            self._patience -= 1
            if not self._patience:
                raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError


def run_chat(folder: Path, typed_text: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed_text))
    return main(["chat", str(folder), "--max-new-tokens", "3", "--device", "cpu", *words])


def test_every_line_is_answered(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_chat(folder, "w5 w6\n\nw9\n/exit\nw11\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert len(out.strip().splitlines()) == 2
    assert "is ready (greedy)" in err
    assert err.count("stopped at 3 tokens") == 2


@pytest.mark.parametrize("word", ["quit", "exit", "bye", "Exit", "quit()", "Bye!"])
def test_a_bare_farewell_is_answered_with_how_to_leave(
    folder: Path, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_chat(folder, f"{word}\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out == "", "the model was not asked"
    assert f"(/exit or Ctrl-D ends the chat; {word} once more is said to the model)" in err
    assert run_chat(folder, f"{word}\n{word}\n/bye\nw5\n", monkeypatch) == 0
    assert capsys.readouterr().out.count("\n") == 1, "it was asked once"


def test_chat_samples_as_the_checkpoint_says(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 0.7}))
    run_chat(folder, "w5\n", monkeypatch, "--seed", "3")
    assert "is ready (sampling, temperature 0.7, top k 50, seed 3)" in capsys.readouterr().err
    run_chat(folder, "w5\n", monkeypatch, "--greedy")
    assert "is ready (greedy)" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["tokenizer", "template"])
def test_what_cannot_chat_is_refused_before_it_is_ready(
    missing: str, tiny: WriteTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama", torch.float32)
    if missing == "tokenizer":
        for file in folder.iterdir():
            if not file.name.startswith("tokenizer"):
                (tmp_path / file.name).symlink_to(file)
        folder = tmp_path
    assert run_chat(folder, "w5\n", monkeypatch) == 1
    err = capsys.readouterr().err
    assert "ready" not in err
    assert ("has no tokenizer" if missing == "tokenizer" else "no chat template") in err


def test_a_turn_that_fails_does_not_end_the_chat(
    tiny: WriteTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{% for m in messages %}{% if m.content == 'w9' %}{{ raise_exception('no w9') }}{% endif %}w5 {% endfor %}"
    folder = with_template(tiny("llama", torch.float32), tmp_path, strict)
    assert run_chat(folder, "w9\n/nope\nw8\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "refuses the messages (user): no w9" in err
    assert "there is no /nope" in err
    assert out.strip()


def test_later_turns_reuse_what_was_seen_and_answer_as_without(model: Any) -> None:
    kept, fresh = Conversation(model, "w3", OPTIONS), Conversation(model, "w3", OPTIONS, reuses=False)
    seen = 0
    for question in ("w5 w6", "w7 w8 w9", "w10"):
        assert kept.answer(question) == fresh.answer(question)
        assert (kept.num_reused, fresh.num_reused) == (seen, 0)
        assert kept._cache is not None
        assert fresh._cache is None
        assert kept._cache.get_seq_length() == len(kept._cached_ids)
        seen = len(kept._cached_ids)


def test_what_is_rendered_otherwise_is_cut_off_the_cache(model: Any) -> None:
    kept, fresh = Conversation(model, None, OPTIONS), Conversation(model, None, OPTIONS, reuses=False)
    for conversation in (kept, fresh):
        conversation.answer("w5 w6 w7")
        conversation.messages[-1]["content"] = "w20"  # as templates do that leave thoughts out
    assert kept.answer("w8") == fresh.answer("w8")
    assert kept.num_reused == 3


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_an_interrupted_answer_stays_in_the_conversation(model: Any, patience: int) -> None:
    kept = Conversation(model, None, {**OPTIONS, "max_new_tokens": 6})
    kept.answer("w5 w6")
    whole = Conversation(model, None, {**OPTIONS, "max_new_tokens": 6})
    whole.answer("w5 w6")
    answer = whole.answer("w8 w9").split()
    with pytest.raises(KeyboardInterrupt):
        kept.answer("w8 w9", Impatient(patience))
    assert kept.messages[-1]["role"] == "assistant"
    assert kept.messages[-1]["content"].split() == answer[:patience]
    fresh = Conversation(model, None, {**OPTIONS, "max_new_tokens": 6}, reuses=False)
    fresh.messages = list(kept.messages)
    seen = len(kept._cached_ids)
    assert kept.answer("w7") == fresh.answer("w7")
    assert kept.num_reused == seen >= 10


@pytest.mark.parametrize("at_layer", [0, 2])
def test_a_pass_that_broke_off_leaves_the_layers_alike(model: Any, at_layer: int) -> None:
    """Interrupted between two layers, some of which have seen the token."""
    kept = Conversation(model, None, OPTIONS)
    kept.answer("w5 w6")
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # the prompt's pass, a token's, and in the midst of the next one
            raise KeyboardInterrupt

    handle = model.model.layers[at_layer].self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept.answer("w8 w9")
    handle.remove()
    assert len(kept.messages) == 4
    assert {layer.get_seq_length() for layer in kept._cache.layers} == {len(kept._cached_ids)}
    fresh = Conversation(model, None, OPTIONS, reuses=False)
    fresh.messages = list(kept.messages)
    assert kept.answer("w7") == fresh.answer("w7")
    assert kept.num_reused > 0


def test_an_answer_that_has_not_begun_leaves_nothing(model: Any) -> None:
    kept = Conversation(model, None, OPTIONS)
    kept.answer("w5 w6")
    before, seen = list(kept.messages), len(kept._cached_ids)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept.answer("w8 w9")
    handle.remove()
    assert kept.messages == before
    fresh = Conversation(model, None, OPTIONS, reuses=False)
    fresh.messages = list(before)
    assert kept.answer("w7") == fresh.answer("w7")
    assert kept.num_reused == seen


def test_states_are_not_reused_after_a_pass_that_broke_off() -> None:
    """Nothing tells how many tokens a state has seen: such a cache is of no use then."""
    keys = torch.zeros(1, 2, 5, 4)
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    for layer in range(2):
        cache.update(keys[:, :, : 5 - layer], keys[:, :, : 5 - layer], layer)
    assert cut_back(cache, 4)
    assert [layer.get_seq_length() for layer in cache.layers] == [4, 4]
    assert not cut_back(cache, 5), "what has not been seen"
    cache.layers[1] = object()
    assert not cut_back(cache, 3)


def test_an_answer_has_its_place_in_the_plan(folder: Path) -> None:
    """The keys and values that are kept count, however little the next prompt adds."""
    with stream(folder, max_context=None, max_batch_size=1, max_memory="60MiB") as model:
        conversation = Conversation(model, None, {**OPTIONS, "max_new_tokens": 40})
        expected = []
        engine = model._engine
        original = engine.plans.expect
        engine.plans.expect = lambda work, is_asked: (expected.append(work.context), original(work, is_asked))
        for question in ("w5 " * 30, "w6", "w7"):
            conversation.answer(question)
        prompts = [30, 30 + 40 + 1, 30 + 40 + 1 + 40 + 1]
        assert expected == [tokens + 40 for tokens in prompts]
        assert conversation.num_reused == prompts[-1] - 2


def test_a_conversation_longer_than_the_model_can_take_is_refused(model: Any) -> None:
    conversation = Conversation(model, None, OPTIONS)
    with pytest.raises(ArgumentError, match="/reset begins a new one"):
        conversation.answer("w5 " * (model.config.max_position_embeddings + 1))
    assert not conversation.messages


def test_commands(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(model, None, OPTIONS)
    assert obey(conversation, "/system w3 w4")
    conversation.answer("w5")
    assert obey(conversation, f"/save {tmp_path / 'talk.json'}")
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved == conversation.messages
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert obey(conversation, "/reset")
    assert conversation.messages == [{"role": "system", "content": "w3 w4"}]
    assert obey(conversation, "/help")
    listed = capsys.readouterr().err
    assert all(name in listed for name in COMMANDS)
    for name in ("/exit", "/quit", "/bye"):
        assert not obey(conversation, name)
    os.mkfifo(tmp_path / "pipe")
    unwritable = [tmp_path / "missing" / "talk.json", tmp_path, tmp_path / "pipe", "~nobody-is-called-so/talk.json"]
    for wrong in ("/nope", "/save", *(f"/save {file}" for file in unwritable)):
        with pytest.raises(ArgumentError):
            obey(conversation, wrong)


def test_a_template_that_refuses_is_named(tiny: WriteTiny, tmp_path: Path) -> None:
    folder = with_template(tiny("llama", torch.float32), tmp_path, "{{ raise_exception('no') }}")
    refused = pytest.raises(UnsupportedError, match=r"refuses the messages \(system, user\): no")
    with stream(folder) as model, refused:
        Conversation(model, "w3", OPTIONS).answer("w5")


ABSURD_TEMPLATES = {
    "a long loop": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "more than memory": ("{{ 'x' * 10**15 }}", "more memory than there is"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "deep": ("{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "maximum recursion depth exceeded"),
    "deep blocks": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "too many levels of indentation"),
}


@pytest.mark.parametrize("case", ABSURD_TEMPLATES)
def test_a_template_that_asks_for_too_much_is_refused(model: Any, case: str) -> None:
    model.tokenizer.chat_template, said = ABSURD_TEMPLATES[case]
    with pytest.raises(UnsupportedError, match=rf"chat template of this model refuses the messages \(user\): .*{said}"):
        encode_chat(model, [{"role": "user", "content": "w5"}])


def test_ctrl_c_ends_a_template_that_does_not(model: Any) -> None:
    """Loops within loops have no limit in jinja."""
    model.tokenizer.chat_template = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    threading.Timer(0.5, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        encode_chat(model, [{"role": "user", "content": "w5"}])
    model.tokenizer.chat_template = TEMPLATE
    assert encode_chat(model, [{"role": "user", "content": "w5"}])["input_ids"].tolist() == [[5]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n\n  \ntwo\n", ["one", "two"]),
        ("one\\\ntwo\nthree\n", ["one\ntwo", "three"]),
        ('"""one\n\ntwo"""\nthree\n', ["one\n\ntwo", "three"]),
        ('"""\none\n"""\n', ["one"]),
        ('"""one line"""\n', ["one line"]),
        ('"""never\nclosed\n', ["never\nclosed"]),
        ("nothing more\\\n", ["nothing more"]),
        ("no line end", ["no line end"]),
        ("one\r\n", ["one"]),
    ],
)
def test_what_is_typed(text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text, newline=""))
    assert list(typed()) == expected
