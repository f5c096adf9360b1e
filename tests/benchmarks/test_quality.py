"""What codecs cost in quality: the program on a tiny model, the wider Llama that computes the same, arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from airstream.codecs.library import has_kernels
from benchmarks.quality import __main__ as quality
from benchmarks.quality import measure, plot, report, text
from benchmarks.quality.measure import Reading
from benchmarks.quality.widen import is_wide, widen
from tests.stand_ins.comparing import BF16, FP32
from tests.stand_ins.tiny_models import LLAMA, TIED, VOCAB_SIZE, TinyModel, tiny_tokenizer, write_model

HALF_BLOCKS = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2}
"""No width of it is a multiple of 128, and three queries share a key, as in SmolLM2-135M."""
ENOUGH_WORDS = {"vocab_size": 512}
"""A GGUF file has 259 at least: control tokens and bytes."""


@pytest.fixture
def narrow(tmp_path: Path) -> Callable[[torch.dtype], Path]:
    def folder_of(dtype: torch.dtype) -> Path:
        write_model(TinyModel("llama", LLAMA | TIED | HALF_BLOCKS | ENOUGH_WORDS), tmp_path / "narrow", dtype)
        tiny_tokenizer().save_pretrained(tmp_path / "narrow")
        return tmp_path / "narrow"

    return folder_of


def test_a_wider_llama_computes_the_same(narrow: Callable[[torch.dtype], Path], tmp_path: Path) -> None:
    folder = narrow(FP32)
    widen(folder, tmp_path / "wide")
    assert not is_wide(folder)
    assert is_wide(tmp_path / "wide")
    ids = torch.randint(3, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    first, second = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (folder, tmp_path / "wide"))
    with torch.no_grad():
        torch.testing.assert_close(second(ids).logits, first(ids).logits, rtol=1e-4, atol=1e-5)
    assert first.config.hidden_size < second.config.hidden_size


def test_what_is_no_plain_llama_is_not_widened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="no Llama"):
        widen(tmp_path, tmp_path / "wide")


@pytest.mark.skipif(not has_kernels(), reason="fast kernels were not compiled")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lossless_costs_nothing_and_four_bits_cost_something(
    narrow: Callable[[torch.dtype], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("matplotlib", "compressed_tensors", "gguf"):
        pytest.importorskip(package)
    words = ["--codecs=lossless,int4", "--gguf=Q8_0", "--windows=2", "--context=24", "--answers=2", "--new-tokens=3"]
    places = [f"--checkpoint={narrow(BF16)}", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'result'}"]
    monkeypatch.setattr(text, "QUESTIONS", ("w3 w4 w5", "w9 w8"))
    (tmp_path / "text").write_text(" ".join(f"w{3 + 7 * number % 125}" for number in range(60)))
    quality.main([*words, *places, f"--text={tmp_path / 'text'}", "--max-memory=1GiB"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "\n".join(lines).strip() in (tmp_path / "result.md").read_text()
    assert str(tmp_path) not in last
    results = json.loads(last)
    assert results == json.loads((tmp_path / "result.json").read_text())
    exact = {form["name"]: form for form in results["forms"] if form["kernels"] == "exact"}
    assert list(exact) == ["bf16", "lossless", "int4", "GGUF Q8_0"]
    assert exact["lossless"]["divergence"] == [0, 0]
    assert exact["lossless"]["agreement"] == [1, 1]
    assert exact["lossless"]["equal_tokens"] == [3, 3]
    assert exact["lossless"]["cross_entropy"] == exact["bf16"]["cross_entropy"]
    assert min(exact["int4"]["divergence"]) > max(exact["GGUF Q8_0"]["divergence"]) > 0
    assert exact["int4"]["layer_bytes"] < exact["GGUF Q8_0"]["layer_bytes"] < exact["bf16"]["layer_bytes"]
    assert [form["name"] for form in results["forms"] if form["kernels"] == "fast"] == ["bf16", "lossless", "int4"]


def test_what_is_compared() -> None:
    """Two words, likely as 3 to 1 and as 1 to 1: all that is asked for has a value that can be worked out by hand."""
    windows = torch.tensor([[0, 1, 0]])
    reference = Reading([torch.tensor([[0.75, 0.25]] * 3).log()], [[5, 6, 7], [5, 6, 7]])
    even = Reading([torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.4, 0.6]]).log()], [[5, 6, 7], [5, 8, 7]])
    found = measure.compare(even, reference, windows)
    halves = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    last = 0.75 * math.log(0.75 / 0.4) + 0.25 * math.log(0.25 / 0.6)
    assert found["cross_entropy"] == pytest.approx([math.log(2)])
    assert found["divergence"] == pytest.approx([(2 * halves + last) / 3])
    assert found["agreement"] == pytest.approx([2 / 3])
    assert found["equal_tokens"] == [3, 1]
    assert measure.compare(reference, reference, windows)["divergence"] == [0]


def test_what_it_adds_up_to() -> None:
    base = {"kernels": "exact", "divergence": [0.0, 0.0], "agreement": [1.0, 1.0], "equal_tokens": [4.0]}
    forms = [
        base | {"name": "bf16", "layer_bytes": 100, "cross_entropy": [1.0, 3.0]},
        base | {"name": "int8", "layer_bytes": 50, "cross_entropy": [1.1, 3.1], "divergence": [0.1, 0.3]},
    ]
    row: dict[str, Any] = report.summarise(forms)[1]
    assert row["share"] == 0.5
    assert row["perplexity"] == pytest.approx(math.exp(2.1))
    assert row["rise"] == pytest.approx((math.expm1(0.1), 0), abs=1e-9)
    assert row["divergence"] == pytest.approx((0.2, 0.1))


def test_prose_is_sentences_alone() -> None:
    sentence = (
        "Here is [a link](there.md) in a **sentence** of more than fifteen words, so that it is long enough to be kept."
    )
    left_out = f"# Heading\n\n```sh\n{sentence}\n```\n\n| {sentence} |\n\nShort.\n"
    kept = text.prose(f"{left_out}\n- {sentence}\n- {sentence}\n")
    assert kept.splitlines() == [sentence.replace("[a link](there.md)", "a link").replace("**", "")] * 2


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    def tokenizer(words: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(words.split())))}

    assert text.windows(tokenizer, "a b c d e", 2, 2).tolist() == [[0, 1], [3, 4]]
    with pytest.raises(ValueError, match="5 tokens"):
        text.windows(tokenizer, "a b c d e", 2, 3)


MEASURED = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "quality.json"


def test_the_table_in_the_documents_is_what_was_measured(tmp_path: Path) -> None:
    table = report.table(json.loads(MEASURED.read_text()))
    for file in (MEASURED.with_suffix(".md"), MEASURED.parents[1] / "quantized.md"):
        assert table in file.read_text(), f"{file.name} has another table than {MEASURED.name}"


def test_a_picture_of_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.main([str(MEASURED), str(tmp_path / "quality.png")])
    assert (tmp_path / "quality.png").stat().st_size > 10_000
