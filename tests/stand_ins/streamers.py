"""A streamer that does something in the middle of a generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class After(BaseStreamer):
    """Calls a function, once, when a token has come after the prompt, in the middle of `generate`."""

    def __init__(self, react: Callable[[], Any]) -> None:
        self.react = react
        self.count = 0
        self.result: Any = None

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count == 3:
            self.result = self.react()

    def end(self) -> None:
        pass
