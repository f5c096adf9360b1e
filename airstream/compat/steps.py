"""This hears from transformers' `generate`, after each pass, how many tokens that pass has given.

It knows the one method that every way of decoding in transformers calls then. It refuses to know who listens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SaysSteps:
    """A mixin for a model class that generates, and has `_accept`."""

    _accept: Callable[[int], None]
    """Called with the tokens that each sequence is given for the pass that is over."""

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        self._accept(int(args[3] if len(args) > 3 else kwargs.get("num_new_tokens", 1)))
        own: Any = super()
        return own._update_model_kwargs_for_generation(*args, **kwargs)
