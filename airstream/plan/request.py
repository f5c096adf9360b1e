"""A request is what is asked of the planner; a workload is what one pass asks for.

Both are numbers. They refuse to know the model: its sizes are in `facts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from airstream.footprint.formulas import Footprint
from airstream.rates.facts import HardwareFacts

HOST = "cpu"


@dataclass(frozen=True, slots=True)
class Workload:
    """One forward pass: `tokens` new tokens for each of `batch_size` sequences that then are `context` tokens long.

    It keeps `logits` positions of each, and sees images of `pixel_values` numbers, all of them together.

    Attributes:
        prompt: the tokens of the prompt, if this is a generation; else 0. It begins with passes over `tokens` of them,
            and ends with `context`.
        is_padded: some tokens are hidden from others, so that attention has a mask.
        has_labels: a loss is computed.
        keeps_states, keeps_attentions: the states, or the attention, of all layers are returned.
        keeps_scores: how many times the scores of every new token are kept.
        beside_bytes: the bytes of the KV caches of other generations that are under way.
    """

    batch_size: int
    context: int
    tokens: int
    logits: int
    pixel_values: int = 0
    prompt: int = 0
    is_padded: bool = False
    has_labels: bool = False
    keeps_states: bool = False
    keeps_attentions: bool = False
    keeps_scores: int = 0
    beside_bytes: int = 0

    @classmethod
    def generation(
        cls, batch_size: int, context: int, prompt_tokens: int | None = None, pixel_values: int = 0
    ) -> Workload:
        """The most that generation up to `context` tokens asks for: the prompt's pass, with the KV cache of the end.

        Without `prompt_tokens`, a prompt may be as long as the context. Several prompts may differ in length.
        `generate` looks at the last logits only.
        """
        prompt = prompt_tokens or context
        return cls(batch_size, context, prompt, 1, pixel_values, prompt, is_padded=batch_size > 1)

    def kv_bytes(self, need: Footprint) -> int:
        """The KV caches after the pass, or at the end of the generation."""
        return need.kv_bytes(self.batch_size, self.context) + self.beside_bytes

    def activation_bytes(self, need: Footprint) -> int:
        """The activations at their largest."""
        passes = [(self.tokens, self.prompt or self.context, self.logits, self.pixel_values, self.is_padded)]
        if 0 < self.prompt < self.context:
            passes.append((1, self.context, 1, 0, True))
        largest = max(need.activation_bytes(self.batch_size, *sizes, has_labels=self.has_labels) for sizes in passes)
        tokens, new = (self.context, self.context - self.prompt) if self.prompt else (self.tokens, 0)
        kept = (tokens, self.context, self.keeps_states, self.keeps_attentions, self.keeps_scores * new)
        return largest + self.batch_size * need.kept_bytes(*kept)

    def bytes(self, need: Footprint) -> int:
        """The KV caches and the activations together, in bytes."""
        return self.kv_bytes(need) + self.activation_bytes(need)


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; None means that the planner chooses.

    Attributes:
        budgets: bytes per tier: "cpu", and the index of the accelerator if one is used.
        budget_notes: per tier, where the budget comes from.
        given: the tiers whose budget is what the user said; of the others it is a share.
        described: per tier that is a share of a described machine's memory, the argument that describes it.
        driver_bytes: the bytes of host memory that an accelerator's driver and libraries take.
        decoding_bytes: the bytes that decoding packed weights takes where the model computes.
        workload: what to make room for, whatever `max_context` and `max_batch_size` say, once it has outgrown them.
        hardware: what the machine can do, if seconds are to be predicted, for prompts of `prompt_tokens`.
    """

    device: str
    budgets: Mapping[str, int]
    budget_notes: Mapping[str, str]
    prompt_tokens: int
    prefetch_batches: int | None = None
    max_context: int | None = None
    max_batch_size: int = 1
    direct_io: bool = True
    staging_bytes: int = 0
    decoding_bytes: int = 0
    driver_bytes: int = 0
    workload: Workload | None = None
    hardware: HardwareFacts | None = None
    described: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    @property
    def tier(self) -> str:
        """The tier that the model computes in: "cpu", or the accelerator's index."""
        return self.device.partition(":")[2] or (HOST if self.device == HOST else "0")
