"""This notices texts that end a generation, and cuts them off from what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

TOKENS_PER_CHARACTER = 4
"""At most: a token that is less than a byte does not exist, a character of more than four bytes neither."""


class StopAt(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Ends the generation of one sequence once one of `stops` is in the text that was generated."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.has_stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._lookback = TOKENS_PER_CHARACTER * max(map(len, stops), default=0) + 8
        self._start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        if self._start is None:
            self._start = input_ids.shape[1] - 1  # the first call comes after the first new token
        tail = input_ids[0, max(self._start, input_ids.shape[1] - self._lookback) :]
        text = self._tokenizer.decode(tail)
        self.has_stopped = any(stop in text for stop in self._stops)
        return torch.full((input_ids.shape[0],), self.has_stopped, dtype=torch.bool, device=input_ids.device)


def has_ended(model: Any, ids: Sequence[int], criteria: Sequence[StopAt]) -> bool:
    """Whether the model, or a stop, ended the generation of `ids`: else there were as many as were allowed."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return any(criterion.has_stopped for criterion in criteria) or (len(ids) > 0 and ids[-1] in ends)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops` in it."""
    found = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


class Holding:
    """Passes text on as it comes, but for an end that may turn out to be the beginning of one of `stops`."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._has_stopped = False

    def pass_on(self, text: str, is_last: bool) -> str:
        """What of `text`, and of what was held back before, can be shown now."""
        if self._has_stopped:
            return ""
        text = self._held + text
        shown = cut(text, self._stops)
        self._has_stopped = len(shown) < len(text)
        if not self._has_stopped and not is_last:
            shown = text[: len(text) - self._num_open(text)]
        self._held = text[len(shown) :]
        return shown

    def _num_open(self, text: str) -> int:
        """How many characters at the end of `text` one of the stops begins with."""
        lengths = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)
