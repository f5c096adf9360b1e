"""A report says what a generation cost: time, bytes, memory, and where the time went."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from airstream.plan.plan import Plan
from airstream.plan.request import HOST
from airstream.reporting.probe import DISK
from airstream.reporting.stats import StreamStats
from airstream.reporting.units import format_bytes, format_rate, format_seconds
from airstream.system.memory import PeakMemory


@dataclass(frozen=True, slots=True)
class RunReport:
    """Costs of one generation. Seconds are wall time.

    Attributes:
        new_tokens: what each sequence was given; `first_tokens`: those of them that came first, all at once.
        ttft_seconds: from the start of the meter to the first new token.
        streamed_bytes, read_seconds: what was read, and while at least one read was under way.
        stall_seconds: computation waited for reads.
        source: what was read from: "disk" or "page cache".
        peak_bytes: rise of the process's resident memory above what it was before the model was loaded.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float
    total_seconds: float
    streamed_bytes: int
    read_seconds: float
    stall_seconds: float
    peak_bytes: int
    planned_peak_bytes: int
    budget_bytes: int
    source: str = DISK
    first_tokens: int = 1

    @property
    def seconds_per_token(self) -> float:
        """Seconds for each token after the first ones, or in all if there are no others."""
        if self.new_tokens <= self.first_tokens:
            return self.total_seconds / max(self.new_tokens, 1)
        return (self.total_seconds - self.ttft_seconds) / (self.new_tokens - self.first_tokens)

    @property
    def read_bytes_per_second(self) -> float | None:
        """The rate of the reads; None if nothing was read."""
        return self.streamed_bytes / self.read_seconds if self.streamed_bytes and self.read_seconds else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self) | {"seconds_per_token": self.seconds_per_token}

    def __str__(self) -> str:
        busy = self.total_seconds - self.stall_seconds
        later = f", then {format_seconds(self.seconds_per_token)} each" if self.new_tokens > self.first_tokens else ""
        return "\n".join(
            (
                f"  tokens    {self.new_tokens} new after {self.prompt_tokens}: first in "
                f"{format_seconds(self.ttft_seconds)}{later}",
                f"  streamed  {self._streamed()}",
                f"  memory    peak {format_bytes(self.peak_bytes)}, planned {format_bytes(self.planned_peak_bytes)}, "
                f"budget {format_bytes(self.budget_bytes)}",
                f"  time      {format_seconds(self.stall_seconds)} waiting for weights, "
                f"{format_seconds(busy)} computing",
            )
        )

    def _streamed(self) -> str:
        rate = self.read_bytes_per_second
        if rate is None:
            return "nothing"
        return f"{format_bytes(self.streamed_bytes)} at {format_rate(rate)} from {self.source}"


class Meter:
    """Measures what happens between `start` and `report`. It is a transformers streamer too: give it to `generate`.

    Make it before the model, so that its memory counts.
    """

    def __init__(self, forward_to: Any = None) -> None:
        self.forward_to = forward_to
        self._memory = PeakMemory()
        self._given: list[tuple[float, int]] = []
        self._started = 0.0
        self._prompt_tokens = 0
        self._before = StreamStats()

    def start(self, stats: StreamStats) -> None:
        """Begin to count, from `stats` on."""
        self._before = StreamStats(**asdict(stats))
        self._given, self._prompt_tokens = [], 0
        self._started = time.perf_counter()

    def put(self, value: Any) -> None:
        """A transformers streamer's: first the prompt's tokens, then new ones as they are chosen.

        One for each sequence comes as a tensor of shape (sequences,), several as one of shape (1, tokens).
        """
        tokens = value.shape[-1] if value.dim() > 1 else 1
        if self._prompt_tokens == 0:
            self._prompt_tokens = tokens
        else:
            self._given.append((time.perf_counter(), tokens))
        if self.forward_to is not None:
            self.forward_to.put(value)

    def end(self) -> None:
        """The generation has ended. `forward_to` is told, too."""
        if self.forward_to is not None:
            self.forward_to.end()

    def report(self, plan: Plan, stats: StreamStats) -> RunReport:
        """The costs so far, by a model's `plan` and `stats`."""
        given = self._given or [(time.perf_counter(), 0)]
        return RunReport(
            prompt_tokens=self._prompt_tokens,
            new_tokens=sum(tokens for _, tokens in given),
            first_tokens=given[0][1],
            ttft_seconds=given[0][0] - self._started,
            total_seconds=given[-1][0] - self._started,
            streamed_bytes=stats.streamed_bytes - self._before.streamed_bytes,
            read_seconds=stats.read_seconds - self._before.read_seconds,
            stall_seconds=stats.stall_seconds - self._before.stall_seconds,
            peak_bytes=self._memory.rise(),
            planned_peak_bytes=plan.tiers[HOST].peak_bytes,
            budget_bytes=plan.tiers[HOST].budget_bytes,
            source=stats.source,
        )
