"""What users see of a command in a program of its own: something at once, nothing of other libraries, nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import WriteTiny
from tests.terminal import screen
from tests.test_chat import with_template

pty = pytest.importorskip("pty", reason="needs a terminal that a program can look at")

pytestmark = pytest.mark.timeout(600)  # programs that import torch, on machines that may do other things besides

WATCHED = """
import os, sys

class Watch:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers"):
            os.write(2, f"<{name}>".encode())

sys.meta_path.insert(0, Watch())
from airstream.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line, which says when torch and transformers are first asked for."""


@pytest.fixture
def folder(tiny: WriteTiny, tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return with_template(tiny("llama", torch.bfloat16), tmp_path / "model")


def environment(**others: str) -> dict[str, str]:
    return {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50", "HF_HUB_OFFLINE": "1", **others}


def on_a_terminal(code: str, *words: str, interrupt_at: str | None = None) -> tuple[int, str]:
    """Run Python `code` on a terminal. Returns its exit status and all that it wrote there.

    Args:
        interrupt_at: press Ctrl-C once this has been written.
    """
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, "-c", code, *words], environment())
    written, is_interrupted = b"", False
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # Linux' way to say that the other end is closed
            chunk = b""
        if not chunk:
            break
        written += chunk
        if interrupt_at and not is_interrupted and interrupt_at.encode() in written:
            is_interrupted = True
            os.write(terminal, b"\x03")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode()


def test_a_command_speaks_before_it_imports_and_leaves_nothing_but_the_answer(folder: Path) -> None:
    words = ("generate", str(folder), "w5 w6", "--max-new-tokens", "2", "--device", "cpu", "--max-memory", "200MiB")
    status, written = on_a_terminal(WATCHED, *words)
    assert status == 0
    assert 0 <= written.index("importing torch and transformers") < written.index("<torch>")
    steps = ["importing", f"loading {folder.name} [", "reading the prompt ["]
    assert sorted(steps, key=written.index) == steps
    lines = screen(written.replace("<torch>", "").replace("<transformers>", ""))
    assert len(lines) == 2
    assert lines[1] == "(greedy; stopped at 2 tokens: --max-new-tokens allows more)"


@pytest.mark.parametrize("moment", ["importing", "<transformers>"])
def test_ctrl_c_leaves_nothing(moment: str, folder: Path) -> None:
    words = ("generate", str(folder), "w5 w6", "--max-new-tokens", "2", "--device", "cpu")
    status, written = on_a_terminal(WATCHED, *words, interrupt_at=moment)
    assert status == 130
    shown = [line.replace("<torch>", "").replace("<transformers>", "") for line in screen(written)]
    assert [line for line in shown if line] == ["^C"]


COMMANDS = """
import io, sys
from airstream.cli import main

folder, small = sys.argv[1:]
common = ["--device", "cpu", "--max-memory", "300MiB"]
main(["generate", folder, "w5 w6", "--max-new-tokens", "2", *common])
main(["generate", folder, "w5 w6", "--max-new-tokens", "2", "--sample", "--seed", "1", *common])
main(["generate", folder, "w5 w6", "--max-new-tokens", "2", "--json", *common])
main(["plan", folder, *common])
main(["verify", folder])
main(["repack", folder, small])
sys.stdin = io.StringIO("w5\\n/exit\\n")
main(["chat", folder, "--max-new-tokens", "2", *common])
"""


def test_commands_say_nothing_that_is_not_theirs(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMANDS, str(folder), str(tmp_path / "repacked")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert result.stderr.splitlines() == [
        "(greedy; stopped at 2 tokens: --max-new-tokens allows more)",
        "(sampling, top k 50, seed 1; stopped at 2 tokens: --max-new-tokens allows more)",
        f"{folder.name} is ready (greedy). /help says what else can be typed.",
        "(stopped at 2 tokens: --max-new-tokens allows more)",
    ]


LIBRARY = """
import sys
import torch
from airstream import AutoModel

ids = torch.arange(3, 12)[None]
for folder in sys.argv[1:]:
    with AutoModel.from_pretrained(folder, device="cpu", max_memory="300MiB") as model:
        model(ids)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=True)
        model.tokenizer
"""

NOTEBOOK = """
import sys, types
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["ipywidgets"] = None
shell = type("ZMQInteractiveShell", (), {})()
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
"""
"""What tqdm looks at to see that it is in one whose widgets are not there."""


@pytest.mark.parametrize("before", ["", NOTEBOOK], ids=["plain", "notebook"])
def test_the_library_says_nothing(before: str, tiny: WriteTiny) -> None:
    """Not at import, not while loading, not in passes: neither of deprecated names nor of missing widgets."""
    folders = [str(tiny(name, torch.float32)) for name in ("llama", "gpt2", "qwen3_moe", "gemma3")]
    command = [sys.executable, "-c", before + LIBRARY, *(folders if not before else folders[:1])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert result.stderr == ""
    assert ("3 tokens" in result.stdout) is bool(before), "the bar of notebooks goes to the cell's output"


def test_a_pipe_that_closes_early_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "airstream", "plan", str(folder), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as child:
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()
