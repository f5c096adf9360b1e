"""This has GPUs that people have, from their data sheets, and says what a machine with one can be expected to do.

It knows `cards.json` and two shares of the data sheets' peaks. It refuses to know torch, and which cards are in this
machine.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files

from airstream.errors import ArgumentError
from airstream.rates.facts import HardwareFacts, Rate, assumed

__all__ = ["PCIE_X16_GBPS", "Card", "all_cards", "card_facts", "find_card"]

PCIE_X16_GBPS = {3: 12.5, 4: 25.5, 5: 52.0}
"""GB/s that large pinned copies reach through 16 lanes, by generation: what is left of 15.8, 31.5 and 63 after packet
headers and flow control. Fewer lanes carry proportionally less."""

WEIGHTS_SHARE = 0.8
"""Of the data sheet's memory bandwidth, what products with one vector reach. Refreshing and turning the memory around
takes a tenth of it from everybody; starting and draining kernels that run for some 100 microseconds takes another."""

FLOPS_SHARE = 0.6
"""Of the data sheet's peak, what matrix products of a prompt reach: clocks drop under load, and edges of tiles idle."""

_NOISE = {
    *("nvidia", "geforce", "gtx", "rtx", "tesla", "quadro"),
    *("amd", "radeon", "rx", "instinct"),
    *("intel", "r", "arc", "tm", "graphics", "gpu", "card"),
}
"""Words of names that tell no two cards apart."""

_FORMS = {"pcie", "sxm"}
"""Words that need not be said where only one form has the memory named."""


FP8_CAPABILITY = 8.9
"""From which on NVIDIA's cards have instructions for FP8, as transformers asks."""


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card, by its data sheet.

    Attributes:
        aliases: what drivers call it, where that differs by more than the vendor's name.
        vram_gib: memory, as sold.
        pcie_generation, pcie_lanes: of the card's own connector.
        bandwidth_gbps: of its memory, GB/s.
        fp16_tflops, bf16_tflops: dense peak of its matrix units, adding up in float32 as torch does; None where it has
            none for the dtype. GeForce cards of NVIDIA add up in float16 twice as fast: that is not this number, nor
            is the one with "sparsity".
        fp32_tflops: peak without matrix units.
        int8_tops: dense peak; None where it is not known.
        compute_capability: what NVIDIA calls the generation of its cores; None of other makers.
        source: the document.
    """

    name: str
    aliases: tuple[str, ...]
    vram_gib: int
    pcie_generation: int
    pcie_lanes: int
    bandwidth_gbps: float
    fp16_tflops: float | None
    bf16_tflops: float | None
    fp32_tflops: float
    int8_tops: float | None
    compute_capability: float | None
    source: str

    @property
    def has_fp8(self) -> bool:
        """Whether transformers multiplies FP8 weights on it as they are."""
        return self.compute_capability is not None and self.compute_capability >= FP8_CAPABILITY


@functools.cache
def all_cards() -> tuple[Card, ...]:
    """Every card there is data of, oldest first. Reads a small file, once."""
    text = files("airstream.rates").joinpath("cards.json").read_text(encoding="utf-8")
    return tuple(Card(**{**entry, "aliases": tuple(entry["aliases"])}) for entry in json.loads(text))


def find_card(name: str) -> Card:
    """The card called `name`, forgivingly: "RTX 3090", "3090", "nvidia geforce rtx 3090", "3090 24GB".

    Memory and form ("PCIe", "SXM") may be left out where one card alone fits what is said.

    Raises:
        ArgumentError: no card, or more than one, is called that; the message names those that are close.
    """
    if not isinstance(name, str):
        raise ArgumentError(f'gpu={name!r} is not the name of a card: use one such as "RTX 3090"')
    words = _words(name)
    exact = [card for card in all_cards() if any(_words(label) == words for label in (card.name, *card.aliases))]
    found = exact or [card for card in all_cards() if _fits(words, card)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ArgumentError(f"{name!r} may be {_listed(card.name for card in found)}: say which")
    raise ArgumentError(f"there is no data of a card {name!r}: {_suggestion(name)}")


def card_facts(
    card: Card | str,
    *,
    disk_gbps: float | None = None,
    pcie_generation: int | None = None,
    pcie_lanes: int | None = None,
    num_cores: int = 0,
) -> HardwareFacts:
    """What a machine with `card` can be expected to do; each rate's `source` says whether it is of the data sheet.

    Args:
        card: or its name, as `find_card` takes it.
        disk_gbps: GB/s of the disk; an assumed NVMe drive's if not given.
        pcie_generation, pcie_lanes: of the slot, where it is older or narrower than the card's connector.
        num_cores: of the host; 0 for those of this machine.

    Raises:
        ArgumentError: there is no such card, or a number makes no sense.
    """
    card = find_card(card) if isinstance(card, str) else card
    guess = assumed("gpu", f"a machine with {card.name}", num_cores)
    link = _link(card, pcie_generation or card.pcie_generation, pcie_lanes or card.pcie_lanes)
    pageable = Rate(link.per_second / 3, "assumed: a third of pinned")
    return replace(
        guess,
        disk=guess.disk if disk_gbps is None else Rate(disk_gbps * 1e9, "given"),
        h2d=link,
        d2h=link,
        h2d_pageable=pageable,
        d2h_pageable=pageable,
        weights=dict.fromkeys(guess.weights, _share(card, WEIGHTS_SHARE, card.bandwidth_gbps, 1e9, "GB/s")),
        flops={
            "bfloat16": _share(card, FLOPS_SHARE, card.bf16_tflops or card.fp32_tflops, 1e12, "TFLOP/s"),
            "float16": _share(card, FLOPS_SHARE, card.fp16_tflops or card.fp32_tflops, 1e12, "TFLOP/s"),
            "float32": _share(card, FLOPS_SHARE, card.fp32_tflops, 1e12, "TFLOP/s"),
        },
    )


def _share(card: Card, share: float, peak: float, unit: float, name: str) -> Rate:
    return Rate(share * peak * unit, f"data sheet: {card.name}, {share:.0%} of {peak:g} {name}")


def _link(card: Card, slot_generation: int, slot_lanes: int) -> Rate:
    """What passes between host and card in such a slot, one way at a time."""
    if slot_generation not in PCIE_X16_GBPS or slot_lanes not in (1, 2, 4, 8, 16):
        raise ArgumentError(
            f"PCIe {slot_generation} x{slot_lanes} is not known: use generation 3, 4 or 5, and 1, 2, 4, 8 or 16 lanes"
        )
    generation, lanes = min(slot_generation, card.pcie_generation), min(slot_lanes, card.pcie_lanes)
    per_second = PCIE_X16_GBPS[generation] * 1e9 * lanes / 16
    return Rate(per_second, f"data sheet: {card.name}, PCIe {generation} x{lanes}")


def _words(name: str) -> frozenset[str]:
    """What tells the card called `name` from others: "NVIDIA GeForce RTX4060Ti 16 GB" is {"4060", "ti", "16gb"}."""
    text = name.lower().replace("generation", " ")
    text = re.sub(r"(\d)\s*gi?b\b", r"\1gb", text)
    text = re.sub(r"\b([gr]tx|rx|arc)(?=[a\d])", r"\1 ", text)
    text = re.sub(r"(\d)(ti|super|xtx)", r"\1 \2", text)
    text = re.sub(r"\bti(?=super)", "ti ", text)
    text = re.sub(r"\bsxm\d\b", "sxm", text)
    return frozenset(re.findall(r"[a-z0-9]+", text)) - _NOISE


def _fits(words: frozenset[str], card: Card) -> bool:
    """Whether `words` say nothing that is not true of `card`, and leave out no more than its memory and form."""
    own = _words(card.name) | {f"{card.vram_gib}gb"}
    may_be_missing = _FORMS | {f"{card.vram_gib}gb"}
    return bool(words) and words <= own and own - words <= may_be_missing


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _suggestion(name: str) -> str:
    """Cards of the same number; or else such as are written alike; or else all, the nearest first."""
    models = {word for word in _words(name) if re.search(r"\d(?!.*gb)", word)}
    same_number = [card.name for card in all_cards() if models & _words(card.name)]
    by_key = {" ".join(sorted(_words(card.name))): card.name for card in all_cards()}
    alike = [by_key[key] for key in difflib.get_close_matches(" ".join(sorted(_words(name))), by_key)]
    close = same_number or alike
    if close:
        return f"did you mean {_listed(close)}?"
    return (
        f"there is of {_listed(_nearest_first(name))}. Name the one that is most like it, and give the memory of "
        'yours: max_memory={0: "4GiB"} (--max-memory 0=4GiB)'
    )


def _nearest_first(name: str) -> list[str]:
    """The names of all cards, those first that are written most like `name`; as in the table if it says nothing."""
    names = [card.name for card in all_cards()]
    if not _words(name):
        return names
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio())
