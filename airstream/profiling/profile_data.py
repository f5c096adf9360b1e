"""Profile data says where the time of a model's passes went, and how well each link was used.

It grows while a recorder is at work on it, in bounded memory: sums are kept of everything, single passes and spans of
the first and the latest. It refuses to know how it is shown.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airstream.profiling.costs import Costs, add_causes
from airstream.rates.facts import Rate
from airstream.reporting.probe import Span

MAX_PASSES = 1000
"""Passes that are kept one by one, besides the first. About 2 kB each."""

MAX_SPANS = 100_000
"""Spans that are kept for traces and pictures, the latest. About 150 bytes each."""

LATE_SECONDS = 0.001
"""A layer that computation waited for longer than this was late."""


@dataclass(slots=True)
class PassProfile:
    """One walk over all layers.

    Attributes:
        number: counted from 0.
        phase: "prefill" or "decode".
        batch_size: sequences; 0 if the call did not say.
        start: seconds since the profile began.
        is_complete: False if it ended with an exception.
    """

    number: int
    phase: str
    batch_size: int
    start: float
    is_complete: bool
    costs: Costs


@dataclass(slots=True)
class LayerProfile:
    """One layer over all passes. Waiting for a layer batch counts for its first layer.

    Attributes:
        late: passes in which computation waited for it for more than a millisecond.
        stalls: `stall_seconds` by what was waited for.
    """

    name: str
    passes: int = 0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0
    longest_stall_seconds: float = 0.0
    late: int = 0
    stalls: dict[str, float] = field(default_factory=dict)

    def waited(self, causes: Mapping[str, float]) -> None:
        """Count one wait in."""
        seconds = sum(causes.values())
        self.stall_seconds += seconds
        self.longest_stall_seconds = max(self.longest_stall_seconds, seconds)
        self.late += seconds > LATE_SECONDS
        add_causes(self.stalls, causes)


@dataclass(slots=True)
class MemoryUse:
    """One memory, in bytes above what was used before loading: the peak while profiling, and the plan's."""

    peak_bytes: int
    planned_bytes: int
    budget_bytes: int


@dataclass(slots=True)
class ProfileData:
    """Everything that was recorded.

    Attributes:
        rates: what each link was measured to be capable of, by its name in `Costs.links`, where that is known.
        is_direct: the disk is read around the page cache; if not, what is "from disk" may come from memory.
        predicted_seconds: of a pass that decodes, by the plan.
        is_predicted_by_guess: some of the rates that this is made from were not measured on this machine.
        prefill, decode: sums over all passes of each kind.
        passes: the first pass, and the latest `MAX_PASSES`.
        layers: by name.
        memory: by tier: "cpu", and the accelerator's index.
        ttft_seconds: what each call of `generate` took to its first new token; the latest `MAX_PASSES`.
        new_tokens: tokens that `generate` has given each sequence; `decoded_tokens`: those by passes that decode.
        spans: the latest, on the clock `probe.now`; `sizes`: (second, what, bytes), for traces.
        started: when the profile began, on that clock.
    """

    model: str
    device: str
    dtype: str
    started: float
    rates: Mapping[str, Rate] = field(default_factory=dict)
    is_direct: bool = True
    predicted_seconds: float | None = None
    is_predicted_by_guess: bool = False
    prefill: Costs = field(default_factory=Costs)
    decode: Costs = field(default_factory=Costs)
    first_pass: PassProfile | None = None
    latest_passes: deque[PassProfile] = field(default_factory=lambda: deque(maxlen=MAX_PASSES))
    layers: dict[str, LayerProfile] = field(default_factory=dict)
    memory: dict[str, MemoryUse] = field(default_factory=dict)
    ttft_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_PASSES))
    new_tokens: int = 0
    decoded_tokens: int = 0
    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=MAX_SPANS))
    sizes: deque[tuple[float, str, int]] = field(default_factory=lambda: deque(maxlen=MAX_SPANS))

    @property
    def passes(self) -> list[PassProfile]:
        """The passes that were kept, oldest first."""
        latest, first = list(self.latest_passes), self.first_pass
        return latest if first is None or latest[0] is first else [first, *latest]

    @property
    def total(self) -> Costs:
        """Everything together."""
        costs = Costs()
        costs.add(self.prefill)
        costs.add(self.decode)
        return costs

    @property
    def seconds_per_token(self) -> float | None:
        """Wall seconds of decoding per token of a sequence; None before there was one. A pass may accept several."""
        return self.decode.wall_seconds / self.decoded_tokens if self.decoded_tokens else None

    @property
    def predicted_seconds_per_token(self) -> float | None:
        """What the plan says of the passes that decoded, per token that they gave; before there was one, per pass."""
        if self.predicted_seconds is None or not self.decoded_tokens:
            return self.predicted_seconds
        return self.predicted_seconds * self.decode.passes / self.decoded_tokens

    @property
    def bottleneck(self) -> str:
        """What took most of the time: "compute", "sampling and Python", or what computation waited for."""
        costs = self.decode if self.decode.passes else self.prefill
        candidates = {"compute": costs.compute_seconds, "sampling and Python": costs.python_seconds, **costs.stalls}
        return max(candidates, key=candidates.__getitem__)

    def add(self, profiled: PassProfile) -> None:
        """A pass has ended."""
        (self.prefill if profiled.phase == "prefill" else self.decode).add(profiled.costs)
        self.first_pass = self.first_pass or profiled
        self.latest_passes.append(profiled)

    def layer(self, name: str) -> LayerProfile:
        """The profile of the layer `name`, which begins with this call if there is none yet."""
        if name not in self.layers:
            self.layers[name] = LayerProfile(name)
        return self.layers[name]

    def to_dict(self) -> dict[str, Any]:
        """All but the spans, as plain values."""
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "bottleneck": self.bottleneck,
            "new_tokens": self.new_tokens,
            "ttft_seconds": list(self.ttft_seconds),
            "seconds_per_token": self.seconds_per_token,
            "predicted_seconds_per_token": self.predicted_seconds_per_token,
            "is_predicted_by_guess": self.is_predicted_by_guess,
            "is_direct": self.is_direct,
            "rates": {link: _plain(rate) for link, rate in self.rates.items()},
            "memory": {tier: _plain(use) for tier, use in self.memory.items()},
            "total": self.total.to_dict(),
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "passes": [_plain(each) | {"costs": each.costs.to_dict()} for each in self.passes],
            "layers": [_plain(each) for each in self.layers.values()],
        }

    def to_json(self) -> str:
        """What `to_dict` gives, as JSON."""
        return json.dumps(self.to_dict())

    def __repr__(self) -> str:
        return f"<Profile of {self.model}: {self.prefill.passes} prefill and {self.decode.passes} decode passes>"


def _plain(data: Any) -> dict[str, Any]:
    """The fields of a dataclass."""
    return {name: getattr(data, name) for name in data.__dataclass_fields__}
