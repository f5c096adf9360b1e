"""A machine is what a plan is for: this one, or one that need not exist.

It knows how much memory there is and which share of it a plan may take unless told, and where the rates come from:
measured here, a data sheet, or given. It refuses to know the parts of models, and never touches a device that is only
described.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from airstream.errors import ArgumentError
from airstream.loading.options import LoadOptions, parse_max_memory, resolve_device
from airstream.plan.facts import ModelFacts
from airstream.plan.policy import AUTO_SHARE, PAGE_CACHE_SHARE, PROMPT_TOKENS
from airstream.plan.request import HOST, Request
from airstream.rates.cards import Card, card_facts, find_card
from airstream.rates.facts import HardwareFacts, Rate, measured_today
from airstream.rates.links import measure_pinned
from airstream.rates.saved import facts_for
from airstream.reporting.units import GIB, format_bytes, parse_budget, parse_bytes
from airstream.system import memory as hardware
from airstream.transfer.buffers import decoding_bytes, staging_bytes
from airstream.transfer.reader import CHUNK_BYTES, NUM_WORKERS

__all__ = ["AUTO_SHARE", "PROMPT_TOKENS", "THIS_MACHINE", "Machine", "Question", "request_for"]


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine to plan for; what is not given is that of this one. Nothing of it has to exist.

    Attributes:
        gpu: the card that computes, by name: "RTX 3090", "4090", "A100 PCIe 80GB". A disk that is not given is then an
            assumed one.
        ram: all memory of the host: bytes, or "64GiB".
        disk_gbps: what the disk that the checkpoint lies on gives, in GB/s.

    Raises:
        ArgumentError: no card, or more than one, is called that; or a number makes no sense.
    """

    gpu: str | None = None
    ram: int | str | None = None
    disk_gbps: float | None = None

    def __post_init__(self) -> None:
        if self.gpu is not None:
            find_card(self.gpu)
        if self.ram is not None:
            parse_budget(self.ram, "ram")
        number = self.disk_gbps
        if number is not None and (
            not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf
        ):
            raise ArgumentError(f"disk_gbps={number!r} is not a rate: use GB/s, such as 3.5")

    @property
    def card(self) -> Card | None:
        """The data sheet of `gpu`."""
        return None if self.gpu is None else find_card(self.gpu)

    def device(self, named: str | int | torch.device | None) -> torch.device:
        """The device that computes. `named` by the user, it has to be there; that of a `gpu` does not."""
        if self.gpu is None:
            return resolve_device(named)
        if named is not None:
            raise ArgumentError(f"device={named!r} and gpu={self.gpu!r} both name what computes: leave one of them out")
        return torch.device("cuda", 0)

    def rates(self, folder: Path, device: torch.device) -> HardwareFacts:
        """What it can do with a checkpoint in `folder`, as far as that is known.

        Nothing is measured, but for the link to an accelerator that nobody has measured: that takes some ten
        milliseconds, and a guess may be wrong by half.
        """
        if self.gpu is not None:
            return card_facts(self.gpu, disk_gbps=self.disk_gbps)
        facts = with_measured_link(facts_for(folder, device), device)
        return facts if self.disk_gbps is None else replace(facts, disk=Rate(self.disk_gbps * 1e9, "given"))

    def driver_bytes(self, device: torch.device) -> int:
        """Host memory that the driver and the libraries of `device` take; of one that is only described, a guess."""
        if self.gpu is not None:
            return hardware.LIBRARY_BYTES["cuda"]
        return 0 if device.type == "cpu" else hardware.driver_bytes(device)

    def described(self, device: torch.device) -> dict[str, str]:
        """The arguments that memories come from which are not looked at, but described."""
        ram = {} if self.ram is None else {HOST: "ram"}
        return ram if self.gpu is None else {**ram, str(device.index): "gpu"}

    def memory(self, device: torch.device, given: Mapping[str, int]) -> dict[str, tuple[int, str]]:
        """Bytes of each memory, and in words what they are. Accelerators whose budget is `given` are not looked at."""
        if self.ram is None:
            found = {HOST: _available(hardware.available_host_bytes())}
        else:
            found = {HOST: _described(parse_bytes(self.ram, "ram"), "RAM")}
        if self.card is not None:
            found[str(device.index)] = _described(self.card.vram_gib * GIB, f"the {self.card.name}")
        elif device.type != "cpu" and str(device.index) not in given:
            found[str(device.index)] = _available(hardware.available_device_bytes(device))
        return found


THIS_MACHINE = Machine()


def check_machine(machine: object) -> None:
    """Raise unless `machine` is one, with what to write instead of the name of a card, or of a dictionary."""
    if isinstance(machine, Machine):
        return
    meant = 'gpu="RTX 3090", ram="64GiB"'
    if isinstance(machine, str):
        meant = f"gpu={machine!r}"
    elif isinstance(machine, Mapping) and all(isinstance(name, str) for name in machine):
        meant = ", ".join(f"{name}={value!r}" for name, value in machine.items())
    raise ArgumentError(f"machine={machine!r} is not a Machine: write machine=Machine({meant}), or leave it out")


@dataclass(frozen=True, slots=True)
class Question:
    """A question is what is asked of the planner, in the user's terms.

    Attributes:
        machine: the machine to plan for. Another one may take its place if neither or both have a `gpu`.
        folder: the folder of the checkpoint: the rate of the disk depends on it.
        device: the device that computes.
        staged: reads into host memory go through staging buffers.
    """

    options: LoadOptions
    machine: Machine
    folder: Path
    device: torch.device
    staged: bool
    prompt_tokens: int = PROMPT_TOKENS


def request_for(question: Question, facts: ModelFacts) -> Request:
    """The user's numbers, and those of the machine where there are none."""
    options, machine, device = question.options, question.machine, question.device
    given = parse_max_memory(options.max_memory, device)
    driver_bytes = machine.driver_bytes(device)  # first of all: whatever asks the device for anything brings it up
    memory = machine.memory(device, given)
    budgets = {name: int(AUTO_SHARE * nbytes) for name, (nbytes, _) in memory.items()} | given
    shares = {name: _share_of(nbytes, words) for name, (nbytes, words) in memory.items()}
    notes = shares | {name: _given(nbytes, *memory.get(name, (nbytes, ""))) for name, nbytes in given.items()}
    total = memory[HOST][0]
    return Request(
        device=str(device),
        budgets=budgets,
        budget_notes=notes,
        given=frozenset(given),
        described={name: words for name, words in machine.described(device).items() if name not in given},
        prefetch_batches=None if options.prefetch_batches == "auto" else options.prefetch_batches,
        max_context=options.max_context,
        max_batch_size=options.max_batch_size,
        direct_io=_direct_io(facts, total - min(budgets[HOST], total), options),
        staging_bytes=staging_bytes(device, NUM_WORKERS, CHUNK_BYTES) if question.staged else 0,
        decoding_bytes=decoding_bytes(device, NUM_WORKERS, CHUNK_BYTES) if facts.stored_bytes is not None else 0,
        driver_bytes=driver_bytes,
        hardware=machine.rates(question.folder, device),
        prompt_tokens=question.prompt_tokens,
    )


def with_measured_link(facts: HardwareFacts, device: torch.device) -> HardwareFacts:
    """`facts`, with the rate of the link to `device` as it is now, if they only have an assumed one."""
    if facts.h2d is None or facts.h2d.is_measured:
        return facts
    per_second = measure_pinned(device)
    if per_second is None:
        return facts
    return replace(facts, h2d=Rate(per_second, f"{measured_today()}; while the model was loaded, the bus alone"))


def _direct_io(facts: ModelFacts, left_over: int, options: LoadOptions) -> bool:
    if options.page_cache == "auto":
        return facts.checkpoint_bytes > PAGE_CACHE_SHARE * left_over
    return not options.page_cache


def _share_of(there: int, words: str) -> str:
    """What is said of a budget that nobody gave, and of what is set aside: the system and other programs live there."""
    return f"{AUTO_SHARE:.0%} of {words}, {format_bytes(there - int(AUTO_SHARE * there))} left to others"


def _given(budget: int, there: int, words: str) -> str:
    """What is said of a budget that the user gave, which may be more than `there` is."""
    return f"given, more than {words}" if budget > there else "given"


def _available(nbytes: int) -> tuple[int, str]:
    return nbytes, f"the {format_bytes(nbytes)} available"


def _described(nbytes: int, what: str) -> tuple[int, str]:
    return nbytes, f"the {format_bytes(nbytes)} of {what}"
