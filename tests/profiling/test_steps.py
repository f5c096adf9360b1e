"""Profile, live line and report count the tokens that a generation gives, however many passes that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessor

from airstream.plan.step import Step
from airstream.profiling.live import LiveLine
from airstream.profiling.report import Meter
from tests.conftest import Resident, WriteTiny, stream

PROMPT = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3]])
NEW_TOKENS = 12


class SeveralCodes(LlamaForCausalLM):
    """Gives two codes a step, as models of sound do: they are two rows of its ids."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return super().generate(*args, **kwargs)[None]


class Repeats(LogitsProcessor):
    """Makes the model say what it said four tokens ago, so that its prompt is a good draft."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(-1, input_ids[:, -4:-3], 1e9)


@dataclass(frozen=True)
class Way:
    """A way of decoding, and what its steps look like.

    Attributes:
        rows: the sequences of the prompt.
        streams: a streamer may listen.
        first: of the first steps, how many tokens go in and how many come out.
        passes: the steps, if there is not one for each token.
        ends_early: what is given in the end is less than beams were given meanwhile.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 1
    sequences: int = 1
    streams: bool = True
    first: tuple[tuple[int, int], ...] = ((9, 1), (1, 1))
    passes: int = NEW_TOKENS
    ends_early: bool = False
    model_class: type | None = None


WAYS = {
    "one after the other": Way(),
    "two sequences": Way(rows=2, sequences=2),
    "a result with scores": Way({"return_dict_in_generate": True, "output_scores": True}),
    "beams": Way({"num_beams": 2}, sequences=2, streams=False),
    "beams that end early": Way(
        {"num_beams": 3, "length_penalty": -2.0, "eos_token_id": [*range(90, 96)]},
        sequences=3,
        streams=False,
        ends_early=True,
    ),
    "samples": Way({"do_sample": True, "num_return_sequences": 3}, sequences=3),
    "several codes": Way(rows=2, sequences=2, model_class=SeveralCodes),
    "a prompt in chunks": Way({"prefill_chunk_size": 4}, first=((4, 0), (4, 0), (1, 1), (1, 1)), passes=NEW_TOKENS + 2),
    "guided": Way({"guidance_scale": 1.5}, first=((9, 1), (1, 0), (1, 1), (1, 0)), passes=2 * NEW_TOKENS),
    "a draft by another model": Way({"assistant_model": True}, first=()),
    "a draft by its own first layers": Way({"assistant_early_exit": 2}, first=()),
    "a draft out of the prompt": Way({"prompt_lookup_num_tokens": 3, "logits_processor": [Repeats()]}, first=()),
}


@pytest.mark.parametrize("name", WAYS)
def test_everybody_counts_the_tokens_that_are_given(tiny: WriteTiny, resident: Resident, name: str) -> None:
    way = WAYS[name]
    length = {"max_new_tokens": NEW_TOKENS} | ({} if way.ends_early else {"min_new_tokens": NEW_TOKENS})
    options = {"do_sample": False} | length | way.options
    if "assistant_model" in options:  # it drafts what the model would say, so that every draft is accepted
        options["assistant_model"] = resident("llama", torch.float32, torch.float32)
    prompt = PROMPT.expand(way.rows, -1)
    chosen = {"model_class": way.model_class} if way.model_class else {}
    steps: list[Step] = []
    meter = Meter()
    with stream(tiny("llama", torch.float32), **chosen) as model, model.profile() as profile:
        engine = model._engine
        line = LiveLine(engine.observer, engine.stats)
        engine.observer.watchers.append(steps.append)
        meter.start(engine.stats)
        with line.following():
            result = model.generate(prompt, streamer=meter if way.streams else None, **options)
            shown = line.text()
        report = meter.report(model.plan, engine.stats)
    given = getattr(result, "sequences", result).shape[-1] - prompt.shape[1]

    assert profile.new_tokens == line.tokens == sum(step.accepted for step in steps) == given
    assert shown.startswith(f"{given} tokens, ")
    assert f"{given} new tokens" in str(profile)
    assert len(profile.ttft_seconds) == 1
    first = next(step.accepted for step in steps if step.accepted)
    assert profile.decoded_tokens == given - first
    assert profile.seconds_per_token == pytest.approx(profile.decode.wall_seconds / (given - first))
    if way.streams:
        assert (report.new_tokens, report.first_tokens, report.prompt_tokens) == (given, first, prompt.shape[1])
        assert f"{given} new after {prompt.shape[1]}" in str(report)
    walked = [step for step in steps if step.tokens]  # of beams that are dropped at the end, no pass says it
    if way.first:
        assert [(step.tokens, step.accepted) for step in walked[: len(way.first)]] == [*way.first]
        assert {(step.sequences, step.kept) for step in walked} == {(way.sequences, 1)}
        assert given < len(profile.passes) if way.ends_early else len(profile.passes) == way.passes
    else:
        assert max(step.accepted for step in steps) > 1, "no draft was accepted: the case is not what it is meant to be"
        assert any(step.tokens == step.kept > 1 for step in walked[1:])


def test_the_prediction_of_a_token_is_that_of_its_share_of_a_pass(tiny: WriteTiny, resident: Resident) -> None:
    draft = resident("llama", torch.float32, torch.float32)
    with stream(tiny("llama", torch.float32)) as model, model.profile() as profile:
        model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft)
    profile.predicted_seconds = 6.0
    assert profile.decode.passes < profile.decoded_tokens
    expected = 6.0 * profile.decode.passes / profile.decoded_tokens
    assert profile.predicted_seconds_per_token == pytest.approx(expected)
    assert profile.to_dict()["predicted_seconds_per_token"] == profile.predicted_seconds_per_token


def test_a_draft_is_no_call_of_its_own(tiny: WriteTiny) -> None:
    """The model that drafts with its own layers takes its time from the tokens of the call that it drafts for."""
    with stream(tiny("llama", torch.float32)) as model, model.profile() as profile:
        model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_early_exit=2)
    phases = [each.phase for each in profile.passes]
    assert phases == sorted(phases, reverse=True), "a pass over the prompt came after the first token"
    assert phases.count("decode") > profile.decoded_tokens


def test_a_pass_that_nobody_generates_with_gives_no_token(tiny: WriteTiny) -> None:
    steps: list[Step] = []
    with stream(tiny("llama", torch.float32)) as model:
        model._engine.observer.watchers.append(steps.append)
        model(PROMPT.expand(2, -1))
    assert steps == [Step(sequences=2, tokens=9, kept=9, accepted=0)]
