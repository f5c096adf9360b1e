"""What users see of a command in a program of its own: something at once, nothing of other libraries, nothing left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from airstream.reporting.status import Share
from tests.cli.test_chat import with_template
from tests.conftest import WriteTiny
from tests.stand_ins.terminal import screen

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
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return {**inherited, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50", "HF_HUB_OFFLINE": "1", **others}


def on_a_terminal(code: str, *words: str, interrupt_at: str | None = None, **others: str) -> tuple[int, str]:
    """Run Python `code` on a terminal. Returns its exit status and all that it wrote there.

    Args:
        interrupt_at: press Ctrl-C once this has been written.
        others: variables of its environment.
    """
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, "-c", code, *words], environment(**others))
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


SPEAKS = """
import fcntl, os, struct, sys, termios
from airstream.reporting.status import showing

fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 50, int(sys.argv[1]), 0, 0))
sys.stdout = open(os.devnull, "w")
with showing(lambda: "x" * 500):
    pass
"""


@pytest.mark.parametrize(
    ("columns", "others", "shown"),
    [
        ("200", {}, f"\x1b[2m{'x' * 199}\x1b[0m"),
        ("40", {"COLUMNS": "200"}, f"\x1b[2m{'x' * 39}\x1b[0m"),
        ("200", {"COLUMNS": "40"}, f"\x1b[2m{'x' * 39}\x1b[0m"),
        ("0", {"COLUMNS": ""}, f"\x1b[2m{'x' * 79}\x1b[0m"),
        ("0", {"COLUMNS": "wide"}, f"\x1b[2m{'x' * 79}\x1b[0m"),
        ("2", {}, "\x1b[2mx\x1b[0m"),
        ("200", {"NO_COLOR": "1"}, "x" * 199),
        ("200", {"NO_COLOR": ""}, f"\x1b[2m{'x' * 199}\x1b[0m"),
        ("200", {"TERM": "dumb"}, None),
        ("200", {"TERM": "dumb", "FORCE_COLOR": "1"}, None),
    ],
)
def test_the_line_is_as_wide_and_as_plain_as_the_terminal_wants_it(
    columns: str, others: dict[str, str], shown: str | None
) -> None:
    status, written = on_a_terminal(SPEAKS, columns, **others)
    assert status == 0
    if shown is None:
        assert written == ""
    else:
        before, _, after = written.partition(shown)
        assert after, written
        assert "x" not in before + after
        assert ("\x1b[2m" in written) is ("\x1b[2m" in shown)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "CLICOLOR_FORCE"])
def test_what_is_no_terminal_gets_no_escape_sequences(name: str) -> None:
    code = "from airstream.reporting.status import showing\nwith showing(lambda: 'x'): print('y')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**{name: "1"}), check=True
    )
    assert (result.stdout, result.stderr) == ("y\n", "")


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


def test_importing_the_model_class_shows_that_it_takes_a_while() -> None:
    code = WATCHED.replace(
        "from airstream.cli import main\nsys.exit(main(sys.argv[1:]))", "from airstream import AutoModel"
    )
    assert "import main" not in code
    status, written = on_a_terminal(code)
    assert status == 0
    assert 0 <= written.index("importing torch and transformers") < written.index("<torch>")
    assert not screen(written.replace("<torch>", "").replace("<transformers>", "").replace("\n", ""))


@pytest.mark.parametrize("moment", ["importing", "<transformers>"])
def test_ctrl_c_leaves_nothing(moment: str, folder: Path) -> None:
    words = ("generate", str(folder), "w5 w6", "--max-new-tokens", "2", "--device", "cpu")
    status, written = on_a_terminal(WATCHED, *words, interrupt_at=moment)
    assert status == 130
    shown = [line.replace("<torch>", "").replace("<transformers>", "") for line in screen(written)]
    assert [line for line in shown if line] == ["^C"]


SWALLOWS = """
import importlib.abc, sys
class Swallowing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print("<torch>", file=sys.stderr, flush=True)
            try:
                while True:
                    pass
            except BaseException:
                raise ImportError("torch is not here")
sys.meta_path.insert(0, Swallowing())
from airstream.__main__ import main
sys.exit(main())
"""
"""Whatever imports optional packages takes an interrupt for an answer."""


def test_ctrl_c_is_heard_though_an_import_swallows_it(folder: Path) -> None:
    status, written = on_a_terminal(SWALLOWS, "plan", str(folder), interrupt_at="<torch>")
    assert status == 130
    assert [line for line in screen(written.replace("<torch>", "")) if line] == ["^C"]


@pytest.mark.parametrize("name", ["airstream.cli.parser", "airstream.cli.wording"])
def test_ctrl_c_before_the_command_line_is_there(name: str) -> None:
    code = SWALLOWS.replace('"torch"', repr(name)).replace('raise ImportError("torch is not here")', "raise")
    status, written = on_a_terminal(code, "plan", "x", interrupt_at="<torch>")
    assert status == 130
    assert [line for line in screen(written.replace("<torch>", "")) if line] == ["^C"]


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
    assert re.sub(r"[0-9.]+ (KiB|m?s)\b", "N", result.stderr).splitlines() == [
        "(greedy; stopped at 2 tokens: --max-new-tokens allows more)",
        "(sampling, top k 50, seed 1; stopped at 2 tokens: --max-new-tokens allows more)",
        "5 files of weights, N, in N",
        "Next, prove it whole:",
        f"  airstream verify {tmp_path / 'repacked'}",
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


IN_A_CELL = (
    NOTEBOOK
    + """
import json, time
shown = []
shell.display_pub = types.SimpleNamespace(publish=lambda data, **others: shown.append((data, others)))

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            shown.append("torch is imported")

sys.meta_path.insert(0, Watch())
from airstream import AutoModel
count = len(shown)
AutoModel.from_pretrained(sys.argv[1], device="cpu", max_memory="300MiB", progress=json.loads(sys.argv[2])).close()
print(json.dumps([shown[:count], shown[count:]]))
"""
)
"""What is published to a notebook's cell while the class is imported, and while a model is loaded."""


@pytest.mark.parametrize("progress", ["auto", False])
def test_a_notebook_is_told_what_goes_on_and_left_clean(progress: object, tiny: WriteTiny) -> None:
    command = [sys.executable, "-c", IN_A_CELL, str(tiny("llama", torch.float32)), json.dumps(progress)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    importing, loading = json.loads(result.stdout)
    assert importing[0][0] == {"text/plain": "importing torch and transformers ..."}, "before torch is"
    assert importing[1] == "torch is imported"
    assert bool(loading) is bool(progress)
    for line in (importing, loading):
        updates = [each for each in line if each != "torch is imported"]
        assert len({each[1]["transient"]["display_id"] for each in updates}) <= 1, "all in one place"
        assert [each[1]["update"] for each in updates] == [False, *[True] * (len(updates) - 1)][: len(updates)]
        assert not updates or updates[-1][0] == {"text/plain": ""}
    assert result.stderr == ""


def test_a_pipe_that_closes_early_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "airstream", "plan", str(folder), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as child:
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()


def test_a_share_is_told_once_there_is_one() -> None:
    share = Share("planning m")
    assert share.text() == "planning m ..."
    share.reach(0.25)
    assert share.text() == "planning m [#####...............] 25%"
