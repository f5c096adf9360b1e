"""This guesses what was meant by a command or an option that is not there: one that is, or what it is called elsewhere.

It knows the messages of argparse. It refuses to know what the commands do.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from airstream.cli.wording import as_options
from airstream.loading.arguments import HARMLESS, HONOURED, ONE_DEVICE, REFUSED, SPREAD
from airstream.reporting.alike import nearest

ELSEWHERE = {
    **dict.fromkeys(("-m", "--model", "-hf"), "MODEL without an option"),
    **dict.fromkeys(("-p", "--prompt"), "PROMPT in quotes without an option"),
    **dict.fromkeys(("-n", "--n-predict", "--predict", "--max-tokens"), "--max-new-tokens"),
    **dict.fromkeys(("-c", "--ctx-size"), "--max-context"),
    **dict.fromkeys(("-s", "-seed"), "--seed"),
    **dict.fromkeys(("-r", "--reverse-prompt"), "--stop"),
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers"), "--max-memory"),
    "-sys": "--system",
}
"""What the same is called in other programs, llama.cpp first of all."""

SHORT = {"-t": "threads", "-tb": "threads_batch"}
"""Short options of llama.cpp that are explained as the long ones are."""

CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<known>.*)\)")


def meant_instead(message: str, usage: str) -> str:
    """What to add to the `message` of a parser, whose `usage` has its options; nothing if there is no guess."""
    choice = CHOICE.search(message)
    if choice is not None:
        return _asked([nearest(choice["given"], re.findall(r"[\w-]+", choice["known"]))])
    left = message.removeprefix("unrecognized arguments: ")
    if left == message:
        return ""
    options = [word.partition("=")[0] for word in left.split() if word.startswith("-")]
    if not options:
        return ": a prompt of several words stands in quotes"
    for option in options:
        name = SHORT.get(option) or option.removeprefix("--").replace("-", "_")
        if option not in ELSEWHERE and (why := _explained(name, left)):
            return f": {option} is of other programs. {why[:1].upper()}{as_options(why[1:])}"
    known = re.findall(r"--[a-z-]+", usage)
    return _asked([_option_meant(option, known) for option in options])


def _explained(name: str, words: str) -> str | None:
    """What to do without the argument `name` of another program; None if it means one of ours, or nothing."""
    if name == "device_map" and SPREAD & set(re.split(r"[\s=]", words)):
        return ONE_DEVICE
    if name in HARMLESS:
        return f"leave it out: {HARMLESS[name]}"
    return REFUSED.get(name)


def _option_meant(option: str, known: Collection[str]) -> str | None:
    ours = HONOURED.get(option.removeprefix("--").replace("-", "_"), ("",))[0]
    meant = ELSEWHERE.get(option.replace("_", "-")) or (f"--{ours.replace('_', '-')}" if ours else None)
    if meant is not None and (meant in known or not meant.startswith("-")):
        return meant
    return nearest(option, known)


def _asked(guesses: Collection[str | None]) -> str:
    found = list(dict.fromkeys(guess for guess in guesses if guess is not None))
    return f": did you mean {' and '.join(found)}?" if found else ""
