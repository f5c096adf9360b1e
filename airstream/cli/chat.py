"""`airstream chat MODEL`: several turns, with the KV cache kept between them."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from transformers import DynamicCache

from airstream.cli.parser import generation_options
from airstream.cli.session import encode_chat, load, note, printing
from airstream.compat import cache_keyword


class Conversation:
    """Turns of a chat, and the KV cache of what the model has seen of it."""

    def __init__(self, model: Any, system: str | None, options: dict[str, Any]) -> None:
        self._model = model
        self._options = options
        self._messages = [{"role": "system", "content": system}] if system else []
        self._cache: DynamicCache | None = None
        self._cached_ids = torch.empty(0, dtype=torch.long)

    def answer(self, text: str, streamer: Any = None) -> str:
        """The model's answer to `text`, which becomes part of the conversation; if it fails, nothing does."""
        asked = [*self._messages, {"role": "user", "content": text}]
        inputs = encode_chat(self._model, asked)
        prompt_ids = inputs["input_ids"]
        cache = self._reusable_cache(prompt_ids[0].cpu())
        self._cache = None  # an interrupted pass leaves it longer in some layers than in others
        keyword = cache_keyword(self._model)
        ids = self._model.generate(**inputs, **self._options, **{keyword: cache}, streamer=streamer)
        self._cache, self._cached_ids = cache, ids[0, :-1].cpu()  # the last token has been chosen, not yet been seen
        reply: str = self._model.tokenizer.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)
        self._messages = [*asked, {"role": "assistant", "content": reply}]
        return reply

    def _reusable_cache(self, ids: torch.Tensor) -> DynamicCache:
        """The cache cut back to what `ids` begins with; templates may render earlier turns differently later on."""
        cache = self._cache
        limit = min(len(ids) - 1, len(self._cached_ids))  # at least one token has to be left for the model to see
        same = int((ids[:limit] == self._cached_ids[:limit]).cumprod(0).sum())
        if cache is None or cache.get_seq_length() != len(self._cached_ids):
            return DynamicCache(config=self._model.config)
        if same < len(self._cached_ids):
            try:
                cache.crop(same)
            except (ValueError, RuntimeError, AttributeError):  # sliding windows and state spaces cannot go back
                return DynamicCache(config=self._model.config)
        return cache


def run(arguments: argparse.Namespace) -> None:
    """Read questions from standard input until it ends; print answers as they come."""
    with load(arguments) as model:
        conversation = Conversation(model, arguments.system, generation_options(arguments))
        note(f"{arguments.model} is ready. Ctrl-C stops an answer, an empty line or Ctrl-D ends the chat.")
        while question := _read_line():
            with printing(model) as streamer:
                _answer(conversation, question, streamer)


def _answer(conversation: Conversation, question: str, streamer: Any) -> None:
    try:
        conversation.answer(question, streamer)
    except KeyboardInterrupt:
        note("\n(stopped; the conversation goes on without this answer)")


def _read_line() -> str:
    """The next line of standard input, with a prompt on a terminal; empty at its end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip()
