"""FP8 weights stay as they are on cards that multiply them, whatever card is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from airstream import AutoModel, Machine, plan_table
from airstream.rates.cards import all_cards, find_card
from tests.stand_ins.quantized_models import write_fp8

NEWER, OLDER = "RTX 4090", "RTX 3090"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    write_fp8("llama", folder)
    return folder


def test_a_plan_for_a_card_that_multiplies_fp8_has_no_dense_weights(folder: Path) -> None:
    newer, older = (AutoModel.plan(folder, machine=Machine(gpu=gpu, ram="8GiB")) for gpu in (NEWER, OLDER))
    assert not newer.streamed_bytes
    assert newer.resident_bytes < older.resident_bytes


def test_the_table_has_each_card_as_its_plan(folder: Path) -> None:
    table = plan_table([folder], [OLDER, NEWER, "T4"], machine=Machine(ram="8GiB"), dtype="bfloat16", max_context=64)
    assert [row.card for row in table.rows] == [OLDER, NEWER, "T4"]
    for row in table.rows:
        plan = AutoModel.plan(folder, machine=Machine(gpu=row.card, ram="8GiB"), max_context=64)
        assert row.needed_bytes == plan.peak_bytes["0"]


def test_what_nvidia_says_of_its_cards() -> None:
    """NVIDIA's table of CUDA GPUs and their compute capability."""
    expected = {"T4": 7.5, "V100 SXM 32GB": 7.0, "A100 SXM 80GB": 8.0, OLDER: 8.6, "L4": 8.9, NEWER: 8.9, "H200": 9.0}
    assert {name: find_card(name).compute_capability for name in expected} == expected
    assert all(card.compute_capability is None for card in all_cards() if card.name.startswith(("RX", "MI", "Arc")))
    assert find_card("RTX 5090").has_fp8
    assert not find_card("MI300X").has_fp8
