"""What models read here: the prose of the project's documents, which none was trained on, and questions to answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("docs/design.md", "docs/guide.md", "docs/log.md")
MIN_WORDS = 15
"""Of a paragraph: what is shorter is seldom a sentence."""

QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "How do I boil an egg so that the yolk stays soft?",
    "Explain to a child what a computer does.",
    "What is the capital of Australia, and what is it known for?",
    "Give me three ideas for a birthday present for my mother.",
    "Write a Python function that says whether a number is prime.",
    "What are the main causes of inflation?",
    "Summarise how plants make food from light.",
    "Write a polite letter to a landlord about a broken heater.",
    "What is the difference between weather and climate?",
    "If a train travels 180 km in two hours, how fast is it?",
    "Name five animals that live in the desert.",
    "Why do we have leap years?",
    "Write a poem of four lines about the sea.",
    "How can I learn to sleep earlier?",
)


def prose(markdown: str) -> str:
    """The paragraphs of a document, one a line: no code, tables, headings or pictures, no addresses of links."""
    text = re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    kept = [line for line in text.splitlines() if not re.match(r" *([|#<]|!\[)", line)]
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n", "\n".join(kept), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("**", "")
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n".join(paragraph for paragraph in paragraphs if len(paragraph.split()) >= MIN_WORDS)


def read(files: Sequence[Path]) -> str:
    """The prose of `files`, one after the other."""
    return "\n".join(prose(file.read_text(encoding="utf-8")) for file in files)


def digest(text: str) -> str:
    """What tells one text from another."""
    return hashlib.sha256(text.encode()).hexdigest()


def windows(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
    """`count` runs of `length` tokens, spread evenly over `text`: (count, length). Nothing is put before them.

    Raises:
        ValueError: there are fewer.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * length:
        raise ValueError(f"the text has {len(ids)} tokens, of {count * length}: take fewer or shorter windows")
    starts = [number * (len(ids) - length) // max(count - 1, 1) for number in range(count)]
    return torch.tensor([ids[start : start + length] for start in starts])


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """The token ids of the first `count` questions, as the model's chat template puts them, if it has one."""
    texts = QUESTIONS[:count]
    if tokenizer.chat_template:
        texts = tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        )
    return [tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"] for text in texts]
