"""This hears from transformers' `generate`, after each pass, how many tokens that pass has given.

It knows the one method that every way of decoding in transformers calls then. It refuses to know who listens.
"""

from __future__ import annotations

from typing import Any


class SaysSteps:
    """A mixin for a model class that generates."""

    def _accept(self, tokens: int) -> None:
        """Each sequence is given so many tokens, for the pass that is over."""
        raise NotImplementedError

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        self._accept(int(args[3] if len(args) > 3 else kwargs.get("num_new_tokens", 1)))
        own: Any = super()
        return own._update_model_kwargs_for_generation(*args, **kwargs)
