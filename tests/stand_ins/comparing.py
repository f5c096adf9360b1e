"""What streamed and resident models are given alike, and how what they make of it is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from airstream.compat.traits import CACHE_KEYWORDS
from tests.stand_ins.tiny_models import VOCAB_SIZE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Use = Callable[[Any], Any]
"""Something done with a model, whose result is compared: tensors and what contains them."""

PROMPT_SHAPES = ((1, 12), (1, 1), (2, 9), (3, 17))


def prompts(batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random prompts; every one but the first is shorter, padded on the left."""
    generator = torch.Generator().manual_seed(100 * batch_size + tokens)
    ids = torch.randint(3, VOCAB_SIZE, (batch_size, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch_size):
        padding = 1 + (tokens - 2) * row // batch_size
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int = 8) -> torch.Tensor:
    """`new_tokens` for every prompt: an end-of-sequence token ends none of them early."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False).cpu()


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits.cpu()


def assert_equal(streamed: Any, reference: Any) -> None:
    """Logits of several prompts, and tokens generated from one of them."""
    for shape in PROMPT_SHAPES:
        inputs = prompts(*shape)
        expected, actual = logits(reference, inputs), logits(streamed, inputs)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected), f"logits of {shape} differ by {(actual - expected).abs().max()}"
    assert torch.equal(greedy(streamed, prompts(2, 9)), greedy(reference, prompts(2, 9)))


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to the bit, tensors in containers and outputs included."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected.keys() - set(CACHE_KEYWORDS):
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def compare(use: Use, streamed: Any, reference: Any) -> None:
    torch.manual_seed(0)
    expected = use(reference)
    torch.manual_seed(0)
    assert_same(use(streamed), expected)
