"""Who looks at the calls of all threads does not wait for ever, whatever the garbage collector finds meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from airstream.streaming import room
from airstream.system import frames
from airstream.system.frames import is_on_stack, running
from tests.conftest import WriteTiny, stream

PROGRAM = """
import sys, threading
from airstream.system.frames import is_on_stack, running

frame, kept = sys._getframe(), []
for number in range(3000):
    garbage = threading.local()
    garbage.itself, garbage.value = garbage, 1  # what gives it back takes the lock of the interpreter's threads
    kept.append([])  # so that the collector comes at another place each time
    assert threading.get_ident() in running()
    assert is_on_stack(frame, threading.get_ident())
"""


def test_no_thread_waits_for_the_garbage_collector() -> None:
    """Before Python 3.12 one did, for ever, if a `threading.local` was among the garbage."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_call_is_under_way_until_it_is_over(is_own: bool) -> None:
    calls, is_seen, may_end = [], threading.Event(), threading.Event()

    def call() -> None:
        calls.append(sys._getframe())
        if is_own:
            assert is_on_stack(calls[0], threading.get_ident())
        is_seen.set()
        assert may_end.wait(60)

    thread = threading.Thread(target=call)
    thread.start()
    assert is_seen.wait(60)
    number = thread.ident
    assert number in running()
    assert is_on_stack(calls[0], number) or is_own
    assert not is_on_stack(calls[0], threading.get_ident())
    may_end.set()
    thread.join()
    assert not is_on_stack(calls[0], number)


def test_who_generates_alone_looks_at_no_other_thread(tiny: WriteTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector is not asked in the token loop, but for generations of several threads."""
    looks: list[int] = []

    def look() -> dict[int, object]:
        looks.append(1)
        return {}

    monkeypatch.setattr(frames, "running", look)
    monkeypatch.setattr(room, "running", look)
    with stream(tiny("llama", torch.float32)) as model:
        model.generate(torch.arange(4, 9)[None], max_new_tokens=4, do_sample=False)
        assert model.plan.streamed_bytes
    assert looks == []
