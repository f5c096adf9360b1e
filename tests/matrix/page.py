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
`python -m tests.matrix --page` of the results of the last full runs (`python -m tests.matrix`,
`python -m tests.matrix.formats`); a test fails if it says anything else.
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

ON_A_CARD = """### On a CUDA card

The same comparison with `device="cuda"` on an NVIDIA H200 (27 November 2026; torch 2.11.0+cu130, transformers
5.17.0, which has 338 types): 319 of them equal to the bit, 11 not tried, and 8 whose tiny model could not be
built or called under transformers 5.17 itself (cohere_compass, cohere_compass_text, aria, fuyu, granite4_vision,
diffusion_gemma, pp_formulanet, video_llava). Results by type were not kept: the tables below are those of the CPU."""
"""What was found by hand; it is in no file of results."""

FORMATS_ON_A_CARD = (
    "On an NVIDIA H200 (27 November 2026; torch 2.11.0+cu130, transformers 5.17.0, accelerate 1.15.0, bitsandbytes "
    "0.50.2), streamed from disk, from host memory and partly resident, these were equal to the bit: bitsandbytes "
    "(nf4 plain, double, with bf16 storage, qwen2; fp4; int8), mxfp4 gpt_oss, bitnet, GPTQ (6 variants), AWQ (2), "
    "AutoRound (2), and 17 types of GGUF. bitnet autobitlinear failed there for its dtypes, as that transformers does "
    "on a CPU. Not run on a card: FP8, which needs the package kernels there, torchao, compressed-tensors."
)

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
    lines += ["", *ON_A_CARD.splitlines()]
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
        f"With {versions}, on a CPU.",
        "",
        FORMATS_ON_A_CARD,
    ]
    return "\n".join(lines) + "\n"


SECTIONS: tuple[Section, ...] = (formats, architectures)
"""Of the page, in order."""
