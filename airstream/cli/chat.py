"""`airstream chat MODEL`: questions and answers until there are no more, and what else can be typed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from airstream.cli.conversation import Conversation
from airstream.cli.encoding import check_chat
from airstream.cli.notes import note
from airstream.cli.reading import typed
from airstream.cli.sampling import choose
from airstream.cli.session import load, printing, tell_beyond
from airstream.cli.wording import as_options
from airstream.errors import AirstreamError, ArgumentError, ClosedError
from airstream.reporting.paths import path_of
from airstream.reporting.units import counted


def run(arguments: argparse.Namespace) -> None:
    """Read questions from standard input until it ends; print answers as they come."""
    with load(arguments) as model:
        check_chat(model)
        stops = arguments.stop or []
        choice = choose(arguments, model.generation_config, samples_by_default=True)
        conversation = Conversation(model, arguments.system, choice.options, stops, reuses=not arguments.no_reuse)
        note(f"{Path(arguments.model).absolute().name} is ready ({choice.words}). /help says what else can be typed.")
        show = partial(printing, model, stops, arguments.max_new_tokens)
        is_told = False
        for text in typed():
            try:
                if text.lower().rstrip("().!;") in FAREWELLS and not is_told:
                    is_told = True
                    note(f"(/exit or Ctrl-D ends the chat; {text} once more is said to the model)")
                elif text.startswith("/") and not text.startswith("//"):
                    if not obey(conversation, text):
                        break
                else:
                    _answer(conversation, text.removeprefix("/"), show)
                    tell_beyond(model, conversation.num_tokens)
                    if not conversation.is_complete:
                        note(f"(stopped at {counted(arguments.max_new_tokens, 'token')}: --max-new-tokens allows more)")
            except ClosedError:
                raise
            except AirstreamError as error:  # of this turn: the conversation can go on
                note(f"airstream: {as_options(str(error))}")


def _answer(conversation: Conversation, question: str, show: Callable[[], AbstractContextManager[Any]]) -> None:
    before = len(conversation.messages)
    try:
        with show() as streamer:
            conversation.answer(question, streamer)
    except KeyboardInterrupt:
        kept = "what there is of the answer is kept" if len(conversation.messages) > before else "nothing was answered"
        conversation.is_complete = True
        note(f"\n(stopped; {kept})")


def obey(conversation: Conversation, text: str) -> bool:
    """Do what a line that begins with "/" says. False to end the chat."""
    name, _, argument = text.partition(" ")
    name = ALSO.get(name, name)
    if name not in COMMANDS:
        raise ArgumentError(f"there is no {name}: /help lists what there is, // begins a text with /")
    return COMMANDS[name][1](conversation, argument.strip())


def _help(*_: Any) -> bool:
    for name, (words, _function) in COMMANDS.items():
        note(f"  {name:<8}{words}")
    note('  """ or \\        three quotes around a text, or a backslash at a line\'s end, make it several lines')
    note("  Ctrl-C          stops an answer; what there is of it stays in the conversation")
    note("Earlier turns stay in memory as keys and values; with --no-reuse they are read again for every answer.")
    return True


def _system(conversation: Conversation, text: str) -> bool:
    if text:
        conversation.system = text
    note(f"(system: {conversation.system or 'none'})")
    return True


def _reset(conversation: Conversation, _: str) -> bool:
    conversation.reset()
    note("(a new conversation)")
    return True


def _save(conversation: Conversation, name: str) -> bool:
    if not name:
        raise ArgumentError("/save needs a file: /save talk.json")
    conversation.save(path_of("/save", name))
    note(f"({counted(len(conversation.messages), 'message')} in {name})")
    return True


def _exit(*_: Any) -> bool:
    return False


COMMANDS: dict[str, tuple[str, Callable[[Conversation, str], bool]]] = {
    "/help": ("        this list", _help),
    "/system": ("TEXT  the system message from now on; alone, say what it is", _system),
    "/reset": ("        begin a new conversation with the same system message", _reset),
    "/save": ("FILE    write the messages to a file, as JSON", _save),
    "/exit": ("        end the chat, as /quit, /bye and Ctrl-D do", _exit),
}

ALSO = {"/quit": "/exit", "/bye": "/exit", "/q": "/exit", "/clear": "/reset", "/?": "/help"}
"""What the same is called elsewhere."""

FAREWELLS = ("quit", "exit", "bye")
"""What ends other programs. It may be meant for the model, which may take minutes: the first time, a hint is given."""
