"""Every part of the plan reads a size of a model under all of the names that configs have for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AriaTextConfig, AutoModelForCausalLM, Gemma4TextConfig, PreTrainedConfig, T5Config

from airstream.checkpoint.stored import CheckpointIndex
from airstream.compat import config_names
from airstream.compat.config_names import first_count, head_count, head_width, hidden_size
from airstream.footprint.of_config import footprint
from airstream.layout.byte_plan import read_specs
from airstream.layout.imagined import imagine
from airstream.layout.parts import divide
from airstream.loading.gather import _arithmetic

TABLES = [name for name in vars(config_names) if name.isupper()]

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

MIXTURES = {
    "moe_topk": lambda: AriaTextConfig(**TINY, moe_num_experts=8, moe_topk=4),
    "top_k_experts": lambda: Gemma4TextConfig(
        **TINY,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=4,
        moe_intermediate_size=48,
    ),
}
"""Of four experts in eight, each under a name that no other config shares."""


@pytest.mark.parametrize("table", TABLES)
def test_each_name_is_found_and_what_is_no_count_is_passed_over(table: str) -> None:
    names = getattr(config_names, table)
    for name in names:
        others = dict.fromkeys(set(names) - {name}, None)
        assert first_count(type("Config", (), {**others, name: 7}), *names, default=1) == 7, name
    assert first_count(type("Config", (), dict.fromkeys(names, 0)), *names, default=1) == 1


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES.keys())
def test_memory_and_time_are_of_the_same_experts(config: Callable[[], PreTrainedConfig]) -> None:
    made = config()
    assert footprint(made, 2, eager_attention=False).intermediate_size == 4 * 48
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    index: CheckpointIndex = imagine(model)
    sums = _arithmetic(model, divide(model, read_specs(model, index, torch.bfloat16, None)))
    assert sums.expert_bytes
    assert sums.expert_share == 4 / 8


def test_heads_need_not_share_the_hidden_size() -> None:
    config = T5Config(d_model=64, num_heads=32, d_kv=128)
    assert (hidden_size(config), head_count(config), head_width(config)) == (64, 32, 128)
