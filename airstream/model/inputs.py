"""This refuses what a model cannot take as inputs: text, a batch as one object, lists, wrong shapes.

It knows how people call tokenizers and models, and what transformers fails at with a message about something else. What
it computes is never refused. It refuses to know what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from airstream.errors import ArgumentError

NAMES = ("inputs", "input_ids", "inputs_embeds")
"""Arguments that are tensors, for every model of text. An attention mask may be several, in a dictionary."""

ID_DTYPES = (torch.int64, torch.int32)
"""The dtypes that embeddings look up."""

AS_TENSORS = 'return_tensors="pt"'

REMEDIES: Mapping[type, str] = {
    str: f"write inputs = model.tokenizer(text, padding=True, {AS_TENSORS}).to(model.device), and then",
    Mapping: f"write inputs = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, {AS_TENSORS}, "
    "return_dict=True).to(model.device), and then",
    int: f"let the tokenizer make them, inputs = model.tokenizer(text, {AS_TENSORS}).to(model.device), and then",
}
"""What is said of a list, by what it consists of: text, the messages of a chat, token ids."""


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


def check_ids(call: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if what a model of text is called with, by `call`, cannot be the ids of tokens, or their mask.

    Raises:
        ArgumentError: the message says what to pass.
    """
    names = ("input_ids", *(("inputs",) if call.endswith("generate") else ()))
    given = [("input_ids", args[0])] if args else [(name, kwargs[name]) for name in names if name in kwargs]
    for name, ids in given:
        if ids is None or kwargs.get("inputs_embeds") is not None:
            continue
        if not isinstance(ids, torch.Tensor):
            remedy = "torch.from_numpy(...) makes one" if hasattr(ids, "__array__") else AS_TENSORS + " makes some"
            raise ArgumentError(f"{call}() takes tensors, and {name} is of type {type(ids).__name__}: {remedy}")
        if ids.dtype not in ID_DTYPES:
            _refuse(
                name,
                ids,
                f"of {ids.dtype}: ids of tokens are whole numbers, as {name}.long() has",
            )
        if ids.dim() < 2:
            _refuse(name, ids, f"one sequence: batches have the shape (sequences, tokens), as {name}[None] has")
        if not ids.numel():
            _refuse(name, ids, "no token: give every sequence one at least, such as model.tokenizer.bos_token_id")
        if call.endswith("generate"):
            _check_mask(ids, kwargs.get("attention_mask"))


def _check_mask(ids: torch.Tensor, mask: Any) -> None:
    """Of a prompt: one number for every token, those that are in a cache as well."""
    if mask is None or isinstance(mask, Mapping):
        return
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else None
    if shape is None or len(shape) != 2 or shape[0] not in (1, ids.shape[0]) or shape[1] < ids.shape[1]:
        what = f"of type {type(mask).__name__}" if shape is None else f"of shape {shape}"
        raise ArgumentError(
            f"attention_mask is {what}: input_ids of shape {tuple(ids.shape)} take a tensor of that shape, 1 for a "
            "token and 0 for padding, as model.tokenizer(..., padding=True) gives it"
        )


def _refuse(name: str, ids: torch.Tensor, what: str) -> NoReturn:
    raise ArgumentError(f"{name} of shape {tuple(ids.shape)} is {what}")


def _first_item(value: Any) -> Any:
    """What lists in lists consist of."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value
