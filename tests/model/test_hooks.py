"""Users' hooks on modules of streamed models: what they see and what they change is as in transformers, to the bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from tests.conftest import STREAMING, least_memory, stream
from tests.matrix.cases import CAUSAL_LM, SEQ2SEQ_LM
from tests.matrix.examine import write
from tests.matrix.inputs import inputs_of

KINDS = {"t5": SEQ2SEQ_LM, "whisper": "AutoModelForSpeechSeq2Seq", "mamba": CAUSAL_LM, "qwen3_moe": CAUSAL_LM}
ALIKE = re.compile(r"\.[023](\.|$)")
"""Layers, and parts of them, that are like the second."""


class Pair(NamedTuple):
    reference: Any
    model: Any
    inputs: dict[str, Any]


@pytest.fixture(params=["t5 streamed", "whisper half", "mamba streamed", "qwen3_moe half"], scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, _, kept = request.param.partition(" ")
    folder: Path = tmp_path_factory.mktemp("hooks")
    write(KINDS[name], name, folder)
    reference = getattr(transformers, KINDS[name]).from_pretrained(folder).eval().requires_grad_(False)
    stays = 0 if kept == "streamed" else sum(weight.nbytes for weight in reference.parameters()) // 2
    with stream(folder, max_memory=least_memory(folder, **STREAMING)["cpu"] + stays) as model:
        yield Pair(reference, model, inputs_of(KINDS[name], name, reference)[0])


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Copies, in order; of what a cache holds, nothing: it goes on changing."""
    leaves = pytree.tree_leaves(value)
    return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def outputs(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return tensors_of(dict(model(**inputs, use_cache=False, output_hidden_states=True)))


def scaled(value: Any, factor: float) -> Any:
    """`value`, the output of a module or what it is called with, times `factor`, as far as it is numbers."""
    if isinstance(value, tuple) and value:
        return (scaled(value[0], factor), *value[1:])
    return value * factor if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def change_input(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return scaled(args, 0.5), {
        name: scaled(value, 0.5) if name == "hidden_states" else value for name, value in kwargs.items()
    }


def numbers_in(output: Any) -> list[torch.Tensor]:
    first = output[0] if isinstance(output, tuple) else output
    return [first] if isinstance(first, torch.Tensor) and first.is_floating_point() else []


def change_in_place(_: nn.Module, __: Any, output: Any) -> None:
    for tensor in numbers_in(output):
        tensor.mul_(1.25)


Seen = list[list[torch.Tensor]]
Register = Callable[[nn.Module, Seen], RemovableHandle]

HOOKS: dict[str, Register] = {
    "reads weights": lambda module, seen: module.register_forward_pre_hook(
        lambda called, _: seen.append(tensors_of(list(called.parameters())))
    ),
    "changes inputs": lambda module, _: module.register_forward_pre_hook(change_input, with_kwargs=True),
    "changes outputs": lambda module, _: module.register_forward_hook(lambda _, __, output: scaled(output, 1.5)),
    "changes outputs in place": lambda module, _: module.register_forward_hook(change_in_place, prepend=True),
    "captures all": lambda module, seen: module.register_forward_hook(
        lambda _, args, kwargs, output: seen.append(tensors_of((args, numbers_in(output)))), with_kwargs=True
    ),
    "reads weights behind": lambda module, seen: module.register_forward_hook(
        lambda called, *_: seen.append(tensors_of(list(called.parameters(recurse=False)))), always_call=True
    ),
}


def assert_same(mine: list[torch.Tensor], theirs: list[torch.Tensor], what: str) -> None:
    assert len(mine) == len(theirs), what
    assert all(map(torch.equal, mine, theirs)), what


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_every_module(pair: Pair, kind: str) -> None:
    plain, changed = outputs(pair.reference, pair.inputs), 0
    for name in [name for name, _ in pair.reference.named_modules() if name and not ALIKE.search(name)]:
        seen: tuple[Seen, Seen] = ([], [])
        given = []
        for model, store in zip((pair.model, pair.reference), seen, strict=True):
            handle = HOOKS[kind](model.get_submodule(name), store)
            try:
                given.append(outputs(model, pair.inputs))
            finally:
                handle.remove()
        assert_same(*given, name)
        assert len(seen[0]) == len(seen[1])
        for mine, theirs in zip(*seen, strict=True):
            assert_same(mine, theirs, name)
        changed += any(not torch.equal(*each) for each in zip(given[0], plain, strict=True)) or any(seen[0])
    assert changed > 3, "the hooks of some modules see or change something"
    assert_same(outputs(pair.model, pair.inputs), plain, "nothing is left behind")


@pytest.mark.parametrize("register", [register_module_forward_pre_hook, register_module_forward_hook])
def test_hooks_of_all_modules_at_once(pair: Pair, register: Callable[..., RemovableHandle]) -> None:
    seen: tuple[list[Any], list[Any]] = ([], [])
    for model, store in zip((pair.model, pair.reference), seen, strict=True):
        handle = register(lambda called, args, *_, store=store: store.append((type(called).__name__, tensors_of(args))))
        try:
            outputs(model, pair.inputs)
        finally:
            handle.remove()
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
    for (name, mine), (_, theirs) in zip(*seen, strict=True):
        assert_same(mine, theirs, name)
