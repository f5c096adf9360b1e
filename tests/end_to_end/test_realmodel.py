"""The main job on weights somebody trained: a real instruct model answers while few of its layers are in memory."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from airstream.cli import demo, main
from airstream.system.memory import PeakMemory
from tests.conftest import stream

pytestmark = pytest.mark.realmodel

QUESTION = [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}]


@pytest.mark.parametrize("max_memory", ["210MiB", "280MiB", "600MiB"])  # about a third resident, most, all
@pytest.mark.parametrize("layers_per_batch", [1, 7])
def test_the_streamed_answer_is_the_resident_answer(
    smollm2_folder: Path, layers_per_batch: int, max_memory: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    resident = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype="auto")
    expected = resident.generate(**inputs, max_new_tokens=24, do_sample=False)
    options = {"layers_per_batch": layers_per_batch, "page_cache": False, "max_context": 128}
    with stream(smollm2_folder, max_memory=max_memory, max_batch_size=1, **options) as model:
        assert (model.plan.streamed_bytes == 0) is (max_memory == "600MiB")
        assert model.plan.resident_bytes > 0
        assert torch.equal(model.generate(**inputs, max_new_tokens=24, do_sample=False), expected)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, resident(**inputs).logits)


@pytest.mark.timeout(900)  # the model is loaded three times
def test_the_demo_answers_within_its_budget_as_transformers_does(
    smollm2_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, rises = PeakMemory(), []

    def without_measuring(*arguments: object) -> int:
        rises.append(memory.rise())  # before transformers has all weights in memory
        return check(*arguments)

    check = demo._check
    monkeypatch.setattr(demo, "_check", without_measuring)
    assert main(["demo", "--device", "cpu", "--max-memory", "200MiB"]) == 0
    printed = capsys.readouterr()
    assert "The capital of Italy is Rome." in printed.out  # how it goes on depends on how the processor rounds
    assert "257 MiB of weights in " in printed.err
    assert "budget 200 MiB" in printed.err
    assert re.search(r"The same \d+ tokens as transformers .*\(checked just now\)", printed.err)
    assert rises[0] < 200 << 20 < (smollm2_folder / "model.safetensors").stat().st_size
    (command,) = re.findall(r"Next, talk to it:\n  airstream (.*)\n", printed.err)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of Italy?\n"))
    assert main([*shlex.split(command), "--device", "cpu", "--max-new-tokens", "8"]) == 0
    assert "Italy" in capsys.readouterr().out
