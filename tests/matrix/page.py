"""docs/models.md, made of results: sections that each read a file of them. Runs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
RESULTS = Path(__file__).with_name("results.json")
FORMAT_RESULTS = ROOT / "docs" / "formats.json"

HEAD = """# Models

Which architectures and which formats of checkpoints are streamed, as the tests found. Made by
`python -m tests.matrix --page` of the results of the last full runs (`python -m tests.matrix`, `python -m
tests.formats`); a test fails if it says anything else.
"""

TITLES: Mapping[str, str] = {
    "AutoModelForCausalLM": "Causal language models",
    "AutoModelForSeq2SeqLM": "Encoder-decoders, and speech with text",
    "AutoModelForImageTextToText": "Images and text",
    "AutoModelForSpeechSeq2Seq": "Speech to text",
    "AutoModelForMaskedLM": "Masked language models",
    "AutoModelForSequenceClassification": "Sequence classifiers",
    "AutoModelForTokenClassification": "Token classifiers",
    "AutoModelForQuestionAnswering": "Question answering",
    "AutoModel": "Models without a head: embeddings",
}

Section = Callable[[], str]


def make_page(sections: Sequence[Section]) -> str:
    """The page: what is above all, then every section."""
    return "\n".join([HEAD, *(section() for section in sections)])


def architectures() -> str:
    """What came out for every architecture."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    by_class: dict[str, list[dict[str, Any]]] = {}
    for row in results["cases"]:
        by_class.setdefault(row["auto_class"], []).append(row)
    lines = [
        "## Architectures",
        "",
        f"With transformers {results['transformers']} and torch {results['torch']}, on a CPU, in float32. Of every",
        "type, a tiny checkpoint with random weights is written by `save_pretrained`, streamed within the smallest",
        "budget there is, and compared with `from_pretrained`: all outputs of a forward pass have to be equal to the",
        "bit, and so do the tokens that `generate` gives greedily. While any layer runs, no other streamed layer may",
        "be in memory. *Streamed* is the share of the tiny model's weights that come anew for every pass.",
        "",
        "| | types | equal to the bit | not tried |",
        "|---|---|---|---|",
    ]
    for auto_class, title in TITLES.items():
        rows = by_class.get(auto_class, [])
        equal = sum(row["verdict"] == "equal" for row in rows)
        lines.append(f"| {title} (`{auto_class}`) | {len(rows)} | {equal} | {len(rows) - equal} |")
    for auto_class, title in TITLES.items():
        lines += ["", f"### {title}", "", *_table(by_class.get(auto_class, []))]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    equal = [row for row in rows if row["verdict"] == "equal"]
    others = [row for row in rows if row["verdict"] != "equal"]
    lines = ["| type | class | outputs | greedy tokens | streamed |", "|---|---|---|---|---|"]
    for row in equal:
        outputs = "equal, with an image" if row["has_image"] else "equal"
        greedy = "equal" if row["generates"] else "-"
        share = f"{min(row['streamed_share'], 1):.0%}"
        lines.append(f"| {row['model_type']} | {row['model_class']} | {outputs} | {greedy} | {share} |")
    if others:
        lines += ["", "Not tried:", "", "| type | why |", "|---|---|"]
        lines += [f"| {row['model_type']} | {row['reason']} |" for row in others]
    return lines


def formats() -> str:
    """What came out for every format of quantised checkpoints."""
    results = json.loads(FORMAT_RESULTS.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in results["versions"].items())
    lines = [
        "## Formats",
        "",
        "safetensors and pickles (`.bin`, `.pth`) of every architecture below; [GGUF](formats.md), of which that page",
        "has the architectures and the types of blocks; and what was quantised before it was saved, of which",
        "[quantized.md](quantized.md) says how each is computed:",
        "",
        "| format | verdict |",
        "|---|---|",
        *(f"| {row['format']} | {row['verdict']} |" for row in results["formats"]),
        "",
        f"With {versions}, on a CPU. Nothing in this table has been run on a GPU.",
    ]
    return "\n".join(lines) + "\n"


SECTIONS: tuple[Section, ...] = (formats, architectures)
"""Of the page, in order."""
