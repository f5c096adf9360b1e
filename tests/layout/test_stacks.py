"""Units are the modules of lists that are called, however deep the lists lie."""

from __future__ import annotations

from torch import nn

from airstream.layout.parts import find_units


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


def holding(**children: nn.Module) -> nn.Module:
    """A module of no class of its own: it only holds others."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def test_layers_in_lists_are_units() -> None:
    model = holding(embed=nn.Embedding(2, 2), decoder=holding(layers=linears(2), norm=nn.LayerNorm(2)))
    assert find_units(model) == [["decoder.layers.0", "decoder.layers.1"]]


def test_lists_in_layers_are_part_of_them() -> None:
    layer = nn.TransformerEncoderLayer(2, 1, 2)
    layer.experts = linears(3)
    assert find_units(holding(layers=nn.ModuleList([layer]))) == [["layers.0"]]


def test_layers_in_stages_are_units() -> None:
    """Nothing would bring a stage's weights: it is never called."""
    stages = nn.ModuleList([linears(2), holding(blocks=linears(1), shrink=nn.Linear(2, 2)), nn.Linear(2, 2)])
    assert find_units(holding(stages=stages)) == [["stages.2"], ["stages.0.0", "stages.0.1"], ["stages.1.blocks.0"]]
    assert find_units(holding(stages=nn.ModuleList([nn.ModuleList(), linears(1)]))) == [["stages.1.0"]]
