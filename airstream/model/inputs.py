"""What a model is called with, where it is not what a model takes: text, a batch as one object, lists of numbers.

Knows how people call tokenizers and models. Refuses to know what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from airstream.errors import ArgumentError

NAMES = ("inputs", "input_ids", "inputs_embeds")
"""Arguments that are tensors, for every model of text. An attention mask may be several, in a dictionary."""

AS_TENSORS = 'return_tensors="pt"'

REMEDIES: Mapping[type, str] = {
    str: f"write inputs = model.tokenizer(text, padding=True, {AS_TENSORS}).to(model.device), and then",
    Mapping: f"write inputs = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, {AS_TENSORS}, "
    "return_dict=True).to(model.device), and then",
    int: f"let the tokenizer make them, inputs = model.tokenizer(text, {AS_TENSORS}).to(model.device), and then",
}
"""By what a list consists of: text, the messages of a chat, token ids."""


def check_inputs(call: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if the model is called, by `call`, with what a tokenizer takes or gives, unlike tensors.

    Raises:
        ArgumentError: the message has the line to write instead.
    """
    for value in [*args[:1], *(kwargs[name] for name in NAMES if name in kwargs)]:
        if isinstance(value, Mapping):
            raise ArgumentError(f"{call}(batch) takes the parts of a batch one by one: write {call}(**batch)")
        item = _first_item(value) if isinstance(value, (str, list, tuple)) else None
        for kind, remedy in REMEDIES.items():
            if isinstance(item, kind):
                given = "a list" if kind is int else "messages" if kind is Mapping else "text"
                raise ArgumentError(f"{call}() takes tensors, not {given}: {remedy} {call}(**inputs)")


def _first_item(value: Any) -> Any:
    """What lists in lists consist of."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value
