"""A call of `generate` as a profile counts it: which of its passes belong to the prompt, and how many tokens it gave.

It knows passes and numbers of tokens. It refuses to know clocks, and what a pass costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from airstream.plan.request import Workload
from airstream.reporting.probe import Moment


@dataclass(slots=True)
class Call:
    """A call of `generate`.

    Attributes:
        start: the point at which it began; once its first pass is over, in seconds.
        prompt_tokens: the length of its prompt, 0 if that is not known.
        passes: the forward passes that have begun and ended.
        prefill_end: when the last pass over the prompt was over, until the first token has been counted.
        counted: the tokens per sequence that have been counted, one for each pass.
        accepted: the tokens per sequence that it gave, once it is over and if they can be seen. Where tokens are
            drafted and checked together, a pass accepts several.
    """

    start: Moment
    prompt_tokens: int
    passes: int = 0
    prefill_end: float | None = None
    counted: int = 0
    accepted: int | None = None

    @property
    def uncounted(self) -> int:
        """The tokens that its passes gave beyond one each."""
        return max((self.accepted or 0) - self.counted, 0)


def phase_of(work: Workload | None, call: Call | None) -> str:
    """`"prefill"` or `"decode"`: what a pass that asks for `work` is to its call, or by itself."""
    if call is None:
        return "prefill" if work is not None and work.tokens > 1 else "decode"
    # A prompt may take several passes; until it is over, the context is no longer than it.
    in_prompt = work is not None and work.context <= call.prompt_tokens
    return "prefill" if in_prompt or not call.passes else "decode"
