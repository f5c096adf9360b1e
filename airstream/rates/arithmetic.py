"""This measures how fast a device computes what decoding is made of: products with one vector, matrix products, layers.

It knows torch, and a tiny Llama built from a config. It refuses to know checkpoints and budgets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from airstream.rates.effort import Effort, fastest_call, seconds_per_call, timed
from airstream.rates.facts import DTYPES
from airstream.transfer.base import Backend
from airstream.transfer.host_memory import HostBuffer

__all__ = ["measure_flops", "measure_layer", "measure_weights", "products"]

LONG_ENOUGH_SECONDS = 0.08
"""A matrix product that takes this long has left behind what small ones lose."""

FEWEST_TOKENS = 32
"""What the search for a size begins with."""


def measure_weights(backend: Backend, memory: torch.Tensor, effort: Effort) -> dict[str, float]:
    """By dtype, bytes of weights per second in products with one vector. Blocks meanwhile.

    Args:
        memory: uint8 memory of the backend's device, overwritten: the weights, as the engine's slabs hold them.
    """

    def rate(dtype: torch.dtype) -> float:
        weights = _weights(memory, dtype, effort)
        nbytes = sum(weight.nbytes for weight in weights)
        return nbytes / seconds_per_call(_products(weights), backend.synchronize, effort.seconds)

    return _by_dtype(rate)


def products(nbytes: int, effort: Effort) -> Callable[[], None]:
    """What multiplies so many bytes of weights, in host memory that it keeps, with one vector, in float32."""
    return _products(_weights(HostBuffer(nbytes).tensor, torch.float32, effort))


def _products(weights: Sequence[torch.Tensor]) -> Callable[[], None]:
    tokens = {weight.shape[1]: _tokens(1, weight) for weight in weights[:2]}

    def multiply() -> None:
        for weight in weights:
            linear(tokens[weight.shape[1]], weight)

    return multiply


def measure_flops(backend: Backend, memory: torch.Tensor, effort: Effort) -> dict[str, float]:
    """By dtype, floating-point operations per second in products of a weight with many tokens. Blocks meanwhile.

    `memory` as in `measure_weights`. A device that is slow at a dtype gets fewer tokens, so that it takes no minutes.
    """

    def rate(dtype: torch.dtype) -> float:
        weight = _weights(memory, dtype, effort)[0]
        tokens = _enough_tokens(backend, weight, effort)
        seconds = seconds_per_call(lambda: linear(tokens, weight), backend.synchronize, effort.seconds)
        return 2 * tokens.shape[1] * weight.numel() / seconds

    return _by_dtype(rate)


def measure_layer(backend: Backend, effort: Effort) -> float:
    """Seconds that one layer of a decode step takes if its weights are next to nothing. Blocks meanwhile.

    The embedding, the head and what `generate` does are spread over the layers, of which there are as many as in a
    small real model. The fastest of a few runs: whatever else the machine does can only add to it.
    """
    model = _tiny_llama(effort.num_layers).to(backend.device)
    prompt = torch.ones((1, 1), dtype=torch.long, device="cpu").to(backend.device)

    def generate() -> None:
        model.generate(prompt, max_new_tokens=effort.num_tokens, do_sample=False)

    seconds = fastest_call(generate, backend.synchronize, effort.seconds)
    return seconds / effort.num_tokens / effort.num_layers


def _by_dtype(rate: Callable[[torch.dtype], float]) -> dict[str, float]:
    """The rates of the dtypes that the device has kernels for."""
    rates = {name: _rate_or_none(rate, getattr(torch, name)) for name in DTYPES}
    return {name: found for name, found in rates.items() if found is not None}


def _rate_or_none(rate: Callable[[torch.dtype], float], dtype: torch.dtype) -> float | None:
    try:
        with torch.no_grad():
            return rate(dtype)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # what torch raises for a kernel that is not there
        return None


def _weights(memory: torch.Tensor, dtype: torch.dtype, effort: Effort) -> list[torch.Tensor]:
    """`memory` as matrices of `effort.matrix`, lying and standing in turn, of numbers like those of a model."""
    rows, columns = effort.matrix
    number = memory.view(dtype).numel() // (rows * columns)
    matrices = memory.view(dtype)[: number * rows * columns].view(number, rows * columns)
    matrices.view(-1, columns).copy_(_random(columns, matrices))
    return [
        matrix.view(shape) for matrix, shape in zip(matrices, cycle([(rows, columns), (columns, rows)]), strict=False)
    ]


def _enough_tokens(backend: Backend, weight: torch.Tensor, effort: Effort) -> torch.Tensor:
    """As many tokens as keep the device busy, and no more than it gets through in good time."""
    number = FEWEST_TOKENS
    while True:
        tokens = _tokens(number, weight)
        seconds = timed(functools.partial(linear, tokens, weight), backend.synchronize)
        if number >= effort.max_tokens or seconds >= LONG_ENOUGH_SECONDS:
            return tokens
        number = min(4 * number, effort.max_tokens)


def _tokens(number: int, weight: torch.Tensor) -> torch.Tensor:
    """Hidden states of `number` tokens, in the shape in which a model has them."""
    return _random(number * weight.shape[1], weight).view(1, number, weight.shape[1])


def _random(count: int, like: torch.Tensor) -> torch.Tensor:
    """`count` numbers in the dtype and on the device of `like`: units that see but one number run cool, and fast."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    return numbers.to(like.dtype).to(like.device)


def _tiny_llama(num_layers: int) -> LlamaForCausalLM:
    """A Llama of 64 hidden dimensions, with the kernels of a large one and no end of text."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of our business
        return LlamaForCausalLM(config).eval().requires_grad_(False)
