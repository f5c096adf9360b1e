"""`airstream generate MODEL PROMPT`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from airstream.cli.encoding import encode, encode_chat
from airstream.cli.notes import note
from airstream.cli.sampling import choose
from airstream.cli.session import load, printing, tell_beyond
from airstream.cli.stopping import StopAt, cut, has_ended
from airstream.profiling.profile import Profile
from airstream.profiling.report import Meter
from airstream.reporting.units import counted

STOPPED, CUT_OFF = "stop", "length"
"""Why a generation ended: the model, or a text of --stop, ended it; or there were as many tokens as were allowed."""


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation as it comes, or one JSON object with it and its costs."""
    prompt = arguments.prompt
    meter = Meter()
    is_profiling = bool(arguments.profile or arguments.trace or arguments.plot)
    with load(arguments, profiling_mode=is_profiling) as model:
        stops = arguments.stop or []
        choice = choose(arguments, model.generation_config, samples_by_default=False)
        inputs = _encode(arguments, model, prompt)
        criteria = [StopAt(model.tokenizer, stops)] if stops else []
        with printing(model, stops, arguments.max_new_tokens, arguments.json) as meter.forward_to:
            meter.start(model.stats)
            output = model.generate(**inputs, **choice.options, streamer=meter, stopping_criteria=criteria)
        report = meter.report(model.plan, model.stats)
        ids = output[0].tolist()[report.prompt_tokens :]
        reason = STOPPED if has_ended(model, ids, criteria) else CUT_OFF
        if arguments.json:
            text = cut(model.tokenizer.decode(ids, skip_special_tokens=True), stops)
            profile = {"profile": model.last_profile.to_dict()} if is_profiling else {}
            found = {"model": arguments.model, "prompt": prompt, "text": text, "finish_reason": reason}
            found |= {"prompt_token_ids": inputs["input_ids"][0].tolist(), "token_ids": ids, "choice": choice.words}
            print(json.dumps({**found, **report.to_dict(), **profile}))
        else:
            end = (
                f"stopped at {counted(len(ids), 'token')}: --max-new-tokens allows more"
                if reason == CUT_OFF
                else "complete"
            )
            note(f"({choice.words}; {end})")
        took = report.prompt_tokens + len(ids)
        tell_beyond(model, took)
        if arguments.max_context and took > arguments.max_context:
            planned = f"--max-context {arguments.max_context} is what memory was planned for, and no limit"
            note(f"({planned}: prompt and answer took {counted(took, 'token')})")
        if arguments.stats:
            note(str(report))
        if is_profiling:
            _show(arguments, model.last_profile)


def _encode(arguments: argparse.Namespace, model: Any, prompt: str) -> dict[str, Any]:
    if not arguments.chat and arguments.system is None:
        return encode(model, prompt)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return encode_chat(model, [*system, {"role": "user", "content": prompt}])


def _show(arguments: argparse.Namespace, profile: Profile) -> None:
    if arguments.profile and not arguments.json:
        note(str(profile))
    if arguments.trace:
        profile.save_trace(arguments.trace)
    if arguments.plot:
        profile.plot(arguments.plot)
