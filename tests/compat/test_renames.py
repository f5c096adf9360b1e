"""Keys that are renamed by the example of another one are renamed as transformers renames them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from airstream.compat.renames import Renamed, Renames
from airstream.compat.weights import natural_order

KEYS = [
    f"{prefix}layers.{layer}.{rest}"
    for prefix in ("", "model.", "model2.", "100%.")
    for layer in (0, 1, 9, 10, 47, 123)
    for rest in (
        "norm.weight",
        "mlp.0.weight",
        "mlp.2.weight",
        "conv.weight_g",
        "ln_1.bias",
        *(f"mlp.experts.{expert}.{name}_proj.weight" for expert in (0, 1, 3, 47, 128) for name in ("gate", "up")),
        "a.1.b.2.c.3.d.4.e.5",
    )
]


class Shifted(WeightRenaming):
    """As transformers has some: code of its own looks at the numbers."""

    def rename_source_key(self, source_key: str) -> Renamed:
        first, found, number = source_key.partition("layers.")
        digits = number.partition(".")[0]
        return (first + found + str(int(digits) + 1) + number[len(digits) :] if found else source_key), None


MERGED = WeightConverter(
    source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
    target_patterns="mlp.experts.gate_up_proj",
    operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
)
MAPPINGS: dict[str, list[WeightRenaming | WeightConverter]] = {
    "nothing": [],
    "experts": [MERGED],
    "a number of its own": [WeightRenaming(".weight_g", ".parametrizations.weight.original0"), MERGED],
    "a number beside one": [WeightRenaming(r"\.mlp\.", "7.mlp.")],
    "one layer alone": [WeightRenaming(r"layers\.1\.", "first.")],
    "numbers by name": [WeightRenaming(r"mlp\.0\.", "mlp.fc1."), WeightRenaming(r"mlp\.2\.", "mlp.fc2.")],
    "one digit alone": [WeightRenaming(r"layers\.\d\.norm", "norm"), MERGED],
    "some digits": [WeightRenaming(r"layers\.[0-3]\.", "early.")],
    "a number kept": [WeightRenaming(r"(layers\.\d+)\.ln_1", r"\1.layernorm_before")],
    "a number moved": [WeightRenaming(r"^layers\.(\d+)\.norm", r"norm.\1")],
    "a number gone": [WeightRenaming(r"layers\.\d+\.norm", "norm")],
    "code of its own": [Shifted("layers", "layers"), MERGED],
}


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_every_key_is_renamed_as_transformers_does(mapping: Sequence[WeightRenaming | WeightConverter]) -> None:
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    asked = []

    def rename(key: str) -> Renamed:
        asked.append(key)
        name, pattern = rename_source_key(key, renamings, converters)
        return name, pattern

    expected = [rename(key) for key in KEYS]
    assert [Renames(rename, mapping)(key) for key in KEYS] == expected


def test_keys_of_one_kind_are_renamed_once() -> None:
    asked = []

    def rename(key: str) -> Renamed:
        asked.append(key)
        name, pattern = rename_source_key(key, [], [MERGED])
        return name, pattern

    renames = Renames(rename, [MERGED])
    for layer in range(10, 100):
        for expert in range(100, 200):
            name = f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
            assert renames(name) == (f"model.layers.{layer}.mlp.experts.gate_up_proj", MERGED.source_patterns[0])
    assert len(asked) == 2


def test_the_natural_order_is_that_of_transformers() -> None:
    keys = [*KEYS, "shard_2", "shard_11", "shard_", "2", "11", "", "a..b", "a.b2c", "layers.02.x", "layers.2.x"]
    for order in (keys, list(reversed(keys))):  # keys that are equal but for a zero keep their order
        assert natural_order(order) == sorted(order, key=dot_natural_key)
