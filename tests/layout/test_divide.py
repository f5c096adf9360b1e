"""Which tensors of a model belong to which part of it: every tensor to one, and what kind each part is."""

from __future__ import annotations

import pytest
import torch

from airstream.layout.parts import Kind
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from tests.conftest import WriteTiny


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen3_moe", "gemma3"])
def test_every_tensor_is_in_one_part(tiny: WriteTiny, name: str) -> None:
    prepared = prepare(tiny(name, torch.float32), LoadOptions(device="cpu", max_context=64))
    parts = prepared.parts
    names = [spec.name for part in parts.parts for spec in part.specs]
    assert len(names) == len(set(names))
    assert set(prepared.model.state_dict()) <= set(names) == set(parts.specs)
    assert [name for kind in Kind for name in (spec.name for spec in parts.specs_of(kind))] == names


def test_the_kinds_of_parts(tiny: WriteTiny) -> None:
    parts = prepare(tiny("llama", torch.float32), LoadOptions(device="cpu", max_context=64)).parts
    named = {kind: [part.name for part in parts.of(kind)] for kind in Kind}
    assert named == {
        Kind.LAYER: [f"model.layers.{number}" for number in range(4)],
        Kind.HEAD: ["lm_head"],
        Kind.TABLE: ["model.embed_tokens.weight"],
        Kind.RESIDENT: [""],
    }
    assert [spec.name for spec in parts.specs_of(Kind.RESIDENT)] == ["model.norm.weight"]
    assert parts.stacks == (4,)
