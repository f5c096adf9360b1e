"""This makes inputs of a model out of what somebody has written: a prompt, or the messages of a conversation.

It knows tokenizers and chat templates. It refuses to know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airstream.compat.blame import told
from airstream.errors import ArgumentError, UnsupportedError


def encode(model: Any, prompt: str) -> dict[str, Any]:
    """`prompt` as the model's inputs: token ids of shape (1, length) and their mask, on the model's device."""
    inputs = dict(model.tokenizer(prompt, return_tensors="pt").to(model.device))
    if not inputs["input_ids"].numel():
        raise ArgumentError(f"the prompt {prompt!r} has no tokens: give some text to continue")
    return inputs


def check_chat(model: Any) -> None:
    """Raise if there is no way to tell the model who says what."""
    if not model.tokenizer.chat_template:
        raise UnsupportedError("this model has no chat template: use `airstream generate` with a plain prompt")


def encode_chat(model: Any, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    """`messages` in the model's chat template, as `encode`. Blocks as long as the template likes."""
    check_chat(model)
    try:
        inputs = model.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template is a program that somebody else wrote
        roles = ", ".join(message["role"] for message in messages)
        said = str(error) or told(error)
        raise UnsupportedError(f"the chat template of this model refuses the messages ({roles}): {said}") from error
    return dict(inputs.to(model.device))
