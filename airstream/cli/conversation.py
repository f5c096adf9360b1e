"""A conversation has the turns of a chat, and the KV cache of what the model has seen of them.

It knows what may be kept from one turn to the next: the keys and values of the tokens that the next prompt begins with,
and of those only. It refuses to know where questions come from and where answers go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from airstream.cli.encoding import encode_chat
from airstream.cli.stopping import StopAt, cut, has_ended
from airstream.compat.config_names import num_positions
from airstream.compat.traits import cache_keyword, cut_back
from airstream.errors import ArgumentError
from airstream.reporting.outputs import written
from airstream.reporting.units import counted


class Conversation:
    """Messages between a user and `model`.

    Args:
        options: options of `generate`.
        stops: texts that end an answer.
        reuses: keep the KV cache of earlier turns. What is computed token by token, or for a whole prompt, is the same
            but for rounding, so that an answer may differ from one for which everything is read anew.

    Attributes:
        messages: as chat templates take them.
        num_tokens: of the last prompt and its answer.
        num_reused: tokens of the last prompt whose keys and values were there already.
        is_complete: the last answer was ended by the model or a stop, not by the number of tokens allowed.
    """

    def __init__(
        self, model: Any, system: str | None, options: dict[str, Any], stops: Sequence[str] = (), reuses: bool = True
    ) -> None:
        self.messages: list[dict[str, str]] = []
        self.num_reused = 0
        self.num_tokens = 0
        self.is_complete = True
        self._model = model
        self._options = options
        self._stops = stops
        self._reuses = reuses
        self._cache: DynamicCache | None = None
        self._cached_ids = torch.empty(0, dtype=torch.long, device="cpu")
        self.system = system

    @property
    def system(self) -> str | None:
        """The message that stands before all others."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *others]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._cache = None

    def answer(self, text: str, streamer: Any = None) -> str:
        """The model's answer to `text`, which becomes part of the conversation.

        So does what there is of it if it is interrupted. If it fails, or has not begun, nothing does.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        inputs = encode_chat(self._model, asked)
        prompt_ids = inputs["input_ids"][0].cpu()
        self._check_length(len(prompt_ids))
        cache, self.num_reused = self._reusable_cache(prompt_ids)
        seen = prompt_ids[: self.num_reused]
        criteria = [StopAt(self._model.tokenizer, self._stops)] if self._stops else []
        recorder = _Recorder(streamer)
        options = {**self._options, cache_keyword(self._model): cache, "stopping_criteria": criteria}
        is_whole = False
        try:
            self._model.generate(**inputs, **options, streamer=recorder)
            is_whole = True
        finally:
            if recorder.ids:
                reply = cut(self._model.tokenizer.decode(recorder.ids, skip_special_tokens=True), self._stops)
                self.messages = [*asked, {"role": "assistant", "content": reply}]
                # The last token has been chosen, and not been seen: if a pass was under way, by some layers only.
                seen = torch.cat([prompt_ids, torch.tensor(recorder.ids[:-1], dtype=torch.long, device="cpu")])
            self._keep(cache, seen, is_whole)
            self.num_tokens = len(prompt_ids) + len(recorder.ids)
        self.is_complete = has_ended(self._model, recorder.ids, criteria)
        return reply

    def save(self, file: Path) -> None:
        """Write the messages to `file` as JSON, in place of what it holds."""
        with written(file) as out:
            out.write((json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n").encode())

    def _check_length(self, num_tokens: int) -> None:
        positions = num_positions(self._model.config)
        if num_tokens >= positions > 0:
            raise ArgumentError(
                f"the conversation has {counted(num_tokens, 'token')} by now, the model takes {positions:,}: /reset "
                "begins a new one"
            )

    def _keep(self, cache: DynamicCache, seen: torch.Tensor, is_whole: bool) -> None:
        """Keep the keys and values of the tokens in `seen`; after a pass that broke off, if that way back exists.

        Layers that keep states instead have none, and nothing tells how far each of them is.
        """
        is_useful = cache.get_seq_length() == len(seen) if is_whole else cut_back(cache, len(seen))
        self._cache, self._cached_ids = (cache if is_useful and self._reuses else None), seen

    def _reusable_cache(self, ids: torch.Tensor) -> tuple[DynamicCache, int]:
        """A cache of what `ids` begins with, and how much that is; templates may render earlier turns differently."""
        cache, self._cache = self._cache, None
        limit = min(len(ids) - 1, len(self._cached_ids))  # at least one token has to be left for the model to see
        same = int((ids[:limit] == self._cached_ids[:limit]).cumprod(0).sum())
        if cache is not None and same and (same == len(self._cached_ids) or cut_back(cache, same)):
            return cache, same
        return DynamicCache(config=self._model.config), 0


class _Recorder:
    """A streamer that keeps the tokens that were chosen, and passes everything on to another one, if there is one."""

    def __init__(self, streamer: Any) -> None:
        self.ids: list[int] = []
        self._has_prompt = False
        self._streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.ids += value.flatten().tolist()
        self._has_prompt = True
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()
