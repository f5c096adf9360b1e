"""The live line: what it says, where it shows, and that it leaves nothing behind."""

from __future__ import annotations

import ctypes
import io
import itertools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import ArgumentError, AutoModel, CheckpointNotFoundError
from airstream.cli.screen import Printer
from airstream.profiling import live
from airstream.profiling.live import LiveLine
from airstream.reporting import status
from airstream.reporting.notebook import in_notebook
from airstream.reporting.status import Activity, StatusLine
from tests.conftest import WriteTiny, stream
from tests.stand_ins.terminal import Terminal

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", torch.bfloat16)


def test_the_line_follows_the_steps(folder: Path) -> None:
    shown: list[tuple[int, str]] = []
    with stream(folder) as model:
        engine = model._engine
        line = LiveLine(engine.observer, engine.stats, lambda: shown.append((line.tokens, line.text())))
        with line.following():
            assert line.text() == "reading the prompt [....................] layer 0 of 4"
            model.generate(IDS, max_new_tokens=4, do_sample=False)
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert [tokens for tokens, _ in shown] == [1, 2, 3, 4]
    assert shown[0][1].startswith("1 token, ")
    assert shown[3][1].startswith("4 tokens, ")
    assert "B/s from page cache" in shown[3][1]
    assert "iB" in shown[3][1]


def test_the_line_says_how_far_the_prompt_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0.0, 1.0)
    monkeypatch.setattr(live, "now", lambda: next(seconds))
    texts = []
    with stream(folder) as model:
        engine = model._engine
        line = LiveLine(engine.observer, engine.stats, max_tokens=2)

        def look(*_: object) -> None:
            texts.append(line.text())

        handles = [layer.register_forward_pre_hook(look) for layer in model.model.layers]
        with line.following():
            model.generate(IDS, max_new_tokens=2, do_sample=False)
            assert line.text().startswith("2 of 2 tokens, ")
        for handle in handles:
            handle.remove()
    prompt = [re.sub(r"[0-9.]+ [GMk]B/s", "R", text) for text in texts[:2]]
    assert prompt == [
        "reading the prompt [....................] layer 1 of 4, R",
        "reading the prompt [#####...............] layer 2 of 4, R, about 6 s more",
    ]
    assert texts[4].startswith("1 of 2 tokens, ")


def test_a_slow_token_shows_its_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0.0, 10.0)
    monkeypatch.setattr(live, "now", lambda: next(seconds))
    texts = []
    with stream(folder) as model:
        line = LiveLine(model._engine.observer, model._engine.stats)
        with line.following():
            handle = model.model.layers[1].register_forward_pre_hook(lambda *_: texts.append(line.text()))
            model.generate(IDS, max_new_tokens=2, do_sample=False)
            handle.remove()
    assert texts[0].startswith("reading the prompt")
    assert texts[1].endswith(", layer 2 of 4")


def test_a_resident_model_reads_nothing(folder: Path) -> None:
    shown: list[str] = []
    with stream(folder, max_memory="1GiB") as model:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        engine = model._engine
        line = LiveLine(engine.observer, engine.stats, lambda: shown.append(line.text()))
        with line.following():
            model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert "B/s" not in shown[-1]


@pytest.mark.parametrize("progress", [True, False, "auto"])
def test_progress_goes_to_standard_error_if_asked_for(
    folder: Path, progress: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with stream(folder, progress=progress) as model:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert not model._engine.observer.watchers
    out, err = capsys.readouterr()
    assert not out
    assert ("3 tokens" in err) is (progress is True)


def test_progress_ends_with_a_failure(folder: Path) -> None:
    with stream(folder, progress=True) as model:
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(IDS, max_new_tokens=-1)
        assert not model._engine.observer.watchers


def test_a_wrong_progress_is_refused(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="progress='loud'"):
        AutoModel.from_pretrained(folder, progress="loud")


@pytest.mark.parametrize(("shell", "expected"), [("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)])
def test_a_notebook_is_recognised(shell: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ipython = types.SimpleNamespace(get_ipython=lambda: type(shell, (), {})())
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert in_notebook() is expected


def test_no_notebook_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes standard output and standard error go to it."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


class Silent:
    """A streamer."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("progress", "streamer", "is_shown"),
    [("auto", None, True), ("auto", Silent(), False), (True, Silent(), True), (False, None, False)],
)
def test_a_terminal_shows_what_goes_on_and_keeps_nothing(
    progress: Any, streamer: Any, is_shown: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = use_terminal(monkeypatch)
    with stream(folder, progress=progress) as model:
        loading = terminal.getvalue()
        model.generate(IDS, max_new_tokens=3, do_sample=False, streamer=streamer)
    assert ("loading" in loading) is (progress is not False)
    assert ("reading the prompt" in terminal.getvalue()) is is_shown
    assert not any(terminal.lines())


def test_a_failure_leaves_nothing_on_the_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with pytest.raises(CheckpointNotFoundError):
        AutoModel.from_pretrained(folder / "missing", progress=True)
    assert "finding the checkpoint" in terminal.getvalue()
    assert not any(terminal.lines())
    with stream(folder, progress=True) as model:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS, max_new_tokens=3)
        handle.remove()
    assert "reading the prompt" in terminal.getvalue()
    assert not any(terminal.lines())


def test_text_and_status_share_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    said = ["1 token"]
    line = StatusLine(lambda: said[0])
    printer = Printer(tokenizer=None, line=line)
    printer.on_finalized_text("The capital ")
    assert terminal.lines() == ["The capital", "1 token"]
    printer.on_finalized_text("of France\nis ")
    said[0] = "2 tokens " + "x" * 80
    line.draw()
    assert terminal.lines() == ["The capital of France", "is", f"2 tokens {'x' * 30}"]
    printer.on_finalized_text("Paris.", stream_end=True)
    line.erase()
    assert terminal.lines() == ["The capital of France", "is Paris.", "", ""]


def test_what_others_print_meanwhile_leaves_no_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    line = StatusLine(lambda: "a line that is much longer than what is printed")
    line.draw()
    terminal.write("one\n")
    line.write("three\n")
    line.erase()
    assert [row for row in terminal.lines() if row] == ["one", "three"]


def test_a_line_fits_and_moves_no_cursor() -> None:
    assert status.fit("a\x1b[2Jb\n\u6f22\u5b57", 80) == "a?[2Jb?\u6f22\u5b57"
    assert status.fit("ab\u6f22\u5b57", 5) == "ab\u6f22"
    assert status.bar(0.5) == "[##########..........]"
    assert status.bar(-1) == f"[{'.' * 20}]"
    assert status.bar(7) == f"[{'#' * 20}]"


def test_an_activity_tells_its_steps_and_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])
    activity = Activity("loading m", ("finding it", "planning"), is_timed=False)
    clock[0] = 105.0
    assert activity.text() == "loading m [....................] finding it ...", "what others may draw on is left alone"
    activity.begin("planning")
    assert activity.text() == "loading m [##########..........] planning, 5 s"


@pytest.mark.parametrize(("term", "expected"), [("xterm-256color", True), ("dumb", False)])
def test_a_status_only_where_a_terminal_can_show_one(
    term: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("TERM", term)
    assert status.can_draw() is expected
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not status.can_draw()


def test_a_line_stays_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are silenced meanwhile, by another standard error."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", began := Terminal())
    line = status.StatusLine(lambda: "working")
    monkeypatch.setattr("sys.stderr", other := Terminal())
    line.draw()
    assert "working" in began.getvalue()
    assert other.getvalue() == ""


@pytest.mark.parametrize(
    ("is_console", "agrees", "term", "expected"),
    [(1, 1, None, True), (1, 0, None, False), (0, 1, None, False), (1, 1, "dumb", False)],
)
def test_a_windows_console_is_asked_whether_it_understands(
    is_console: int, agrees: int, term: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a console that is imagined: what a real one draws is not known here."""
    modes: list[int] = []

    def get(handle: int, mode: Any) -> int:
        mode._obj.value = 3
        return is_console

    def set_mode(handle: int, mode: int) -> int:
        modes.append(mode)
        return agrees

    kernel = types.SimpleNamespace(GetConsoleMode=get, SetConsoleMode=set_mode)
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(get_osfhandle=lambda number: number))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    console: Any = types.SimpleNamespace(closed=False, isatty=lambda: True, fileno=lambda: 2)
    assert status.can_draw(console) is expected
    assert modes in ([], [3 | 4])
