"""The live line: what it says, where it shows, and that it leaves nothing behind."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from airstream import ArgumentError, AutoModel
from airstream.cli import screen
from airstream.cli.screen import StatusPrinter
from airstream.live import LiveLine, in_notebook
from tests.conftest import WriteTiny, stream

IDS = torch.arange(3, 12)[None]


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", torch.bfloat16)


def test_the_line_follows_the_passes(folder: Path) -> None:
    shown: list[tuple[int, str]] = []
    with stream(folder) as model:
        engine = model._engine
        with LiveLine(engine.observer, engine.stats, lambda *what: shown.append(what)).following():
            model.generate(IDS, max_new_tokens=4, do_sample=False)
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert [tokens for tokens, _ in shown] == [1, 2, 3, 4]
    assert shown[0][1].startswith("1 token, ")
    assert shown[3][1].startswith("4 tokens, ")
    assert "B/s from page cache" in shown[3][1]
    assert "iB" in shown[3][1]


def test_a_resident_model_reads_nothing(folder: Path) -> None:
    shown: list[str] = []
    with stream(folder, max_memory="1GiB") as model:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        engine = model._engine
        with LiveLine(engine.observer, engine.stats, lambda _, text: shown.append(text)).following():
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


class Terminal(io.StringIO):
    """A screen of 40 columns, as far as the codes that `StatusPrinter` writes go."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        rows: list[list[str]] = [[]]
        row = column = 0
        saved = (0, 0)
        text = self.getvalue()
        position = 0
        while position < len(text):
            for code in ("\x1b7", "\x1b8", "\x1bD", "\x1b[A", "\x1b[B", "\x1b[2K", "\x1b[2m", "\x1b[0m", "\r", "\n"):
                if text.startswith(code, position):
                    break
            else:
                code = ""
            if not code:
                rows[row].extend(" " * (column + 1 - len(rows[row])))
                rows[row][column] = text[position]
                column += 1
            elif code == "\x1b7":
                saved = (row, column)
            elif code == "\x1b8":
                row, column = saved
            elif code in ("\x1bD", "\x1b[B", "\n"):
                row += 1
                rows.extend([] for _ in range(row + 1 - len(rows)))
                column = 0 if code == "\n" else column
            elif code == "\x1b[A":
                row -= 1
            elif code == "\x1b[2K":
                rows[row] = []
            elif code == "\r":
                column = 0
            position += len(code) or 1
        return ["".join(line).rstrip() for line in rows]


def test_text_and_status_share_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: types.SimpleNamespace(columns=40))
    printer = StatusPrinter(tokenizer=None)
    printer.on_finalized_text("The capital ")
    printer.show("1 token")
    assert terminal.lines() == ["The capital", "1 token"]
    printer.on_finalized_text("of France\nis ")
    printer.show("2 tokens " + "x" * 80)
    assert terminal.lines() == ["The capital of France", "is", f"2 tokens {'x' * 30}"]
    printer.on_finalized_text("Paris.", stream_end=True)
    assert terminal.lines() == ["The capital of France", "is Paris.", ""]


@pytest.mark.parametrize(("term", "expected"), [("xterm-256color", True), ("dumb", False)])
def test_a_status_only_where_a_terminal_can_show_one(
    term: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert screen.can_show_status() is expected
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not screen.can_show_status()
