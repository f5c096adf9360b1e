"""This watches a call of `generate`: which of its passes belong to the prompt, and the tokens that its steps give.

It is told of passes and tokens, by the thread that generates. It refuses to know clocks, and what a pass costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from airstream.plan.request import Workload
from airstream.plan.step import Step
from airstream.reporting.probe import Moment

PREFILL, DECODE = "prefill", "decode"


@dataclass(slots=True)
class Call:
    """A call of `generate`.

    Attributes:
        prompt_tokens: the length of its prompt, 0 if that is not known.
        start: the point at which it began; once its first pass is over, in seconds.
        walks: the forward passes that have begun; `passes`: those of them that drafted nothing.
        phase: what the latest of them is to the call, "prefill" or "decode".
        prefill_end: when the last pass over the prompt was over, until the first token has been counted.
        given: the tokens that each sequence has been given; `decoded`: those of them by passes that decode.
        counted: how many of `given`, and of `decoded`, a profile has counted.
    """

    prompt_tokens: int
    start: Moment = 0.0
    walks: int = 0
    passes: int = 0
    phase: str = PREFILL
    prefill_end: float | None = None
    given: int = 0
    decoded: int = 0
    counted: tuple[int, int] = (0, 0)
    _walked: Step | None = None
    _is_drafting: bool = False

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Around passes whose tokens are a draft: it gives nobody a token."""
        before, self._is_drafting = self._is_drafting, True
        try:
            yield
        finally:
            self._is_drafting = before

    def begin_pass(self, work: Workload | None) -> Step | None:
        """A pass that asks for `work` begins. Gives the step before it, if that gave no token."""
        if self.passes and not self._is_in_prompt(work):
            self.phase = DECODE  # for good: a guided generation also runs on a second, shorter context
        self.walks += 1
        self.passes += not self._is_drafting
        return self._take(0)

    def end_pass(self, work: Workload | None) -> None:
        """It is over. What it gives is said next, if it gives anything."""
        self._walked = Step.of(work, 0)

    def accept(self, tokens: int) -> Step | None:
        """Each sequence is given so many tokens, for the pass that is over. Gives the step; None if it is a draft."""
        if self._is_drafting:
            return None
        self.given += tokens
        self.decoded += tokens if self.phase == DECODE else 0
        return self._take(tokens) or Step.of(None, tokens)

    def correct(self, tokens: int | None) -> Step | None:
        """Its result has `tokens` per sequence. Corrects the count where steps said nothing, or beams were dropped."""
        missing = 0 if tokens is None or self._is_drafting else tokens - self.given
        return self.accept(missing) if missing else None

    def _is_in_prompt(self, work: Workload | None) -> bool:
        """A prompt may take several passes; until it is over, the context is no longer than it."""
        return work is not None and work.context <= self.prompt_tokens

    def _take(self, accepted: int) -> Step | None:
        step, self._walked = self._walked, None
        return replace(step, accepted=accepted) if step is not None else None


def phase_of(work: Workload | None) -> str:
    """`"prefill"` or `"decode"`: what a pass that asks for `work` is where no call says it."""
    return PREFILL if work is not None and work.tokens > 1 else DECODE
