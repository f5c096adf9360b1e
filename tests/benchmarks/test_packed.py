"""The program that compares forms of one model runs, and says what each took."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import packed
from tests.conftest import WriteTiny
from tests.stand_ins.comparing import BF16


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_forms_are_run_in_turns(
    tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = tiny("llama", BF16)
    forms = [f"{folder}:exact", f"{folder}:fast"]
    monkeypatch.setattr("sys.argv", ["packed", *forms, "--max-memory", "200MiB", "--tokens", "2", "--turns", "1"])
    packed.main()
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(":")[0] for line in said[:2]] == forms
    assert [line.split("|")[1].strip().rpartition(":")[2] for line in said[-2:]] == ["exact", "fast"]
    assert " 1.00 |" in said[-2]
