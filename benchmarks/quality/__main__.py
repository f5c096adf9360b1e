"""What codecs cost in quality, on real weights.

    python -m benchmarks.quality --work FOLDER [--checkpoint DIR] [--out NAME] [--gguf Q8_0,Q4_0]

The checkpoint, by default the demo's SmolLM2-135M-Instruct, is written anew with every codec into `--work`, once. A
Llama whose widths are no multiples of 128 is widened by zeros first, so that `int4` and `fp8` take all of its layers.
Each form, computed by airstream in bfloat16, reads the same text and answers the same questions, with no chance in
it: there is no seed. What it predicts is compared with what the bf16 checkpoint predicts. With `kernels="fast"` eight
tokens are read at a time, since more are multiplied in another way. `--gguf` writes the checkpoint as GGUF with the
package gguf, too, the matrices of its layers in blocks of that type, and streams that.

It prints a Markdown table and, as the last line, everything as JSON; `--out NAME` writes NAME.json, NAME.md and
NAME.png. Peak host memory: two bytes for each token and word of the vocabulary, twice, and the model.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from airstream import repack
from airstream.codecs.names import CODEC_NAMES
from airstream.demo.model import prepare
from benchmarks import charts
from benchmarks.conditions import describe_machine
from benchmarks.launch import say
from benchmarks.quality import measure, plot, report, text
from benchmarks.quality.measure import Form
from benchmarks.quality.widen import is_wide, widen
from benchmarks.settings import known_names

PACKAGES = ("torch", "transformers", "bitsandbytes", "compressed-tensors", "torchao", "gguf")


def forms(checkpoint: Path, codecs: Sequence[str], ggufs: Sequence[str], work: Path) -> Iterator[Form]:
    """Everything to be measured, the reference first. What is not there yet is written when its turn comes."""
    for kernels in ("exact", "fast"):
        yield Form(report.REFERENCE, checkpoint, kernels)
    for codec in codecs:
        out = repack(checkpoint, work / f"{checkpoint.name}-{codec}", codec=codec, progress=False)
        for kernels in ("exact", "fast"):
            yield Form(codec, out, kernels)
    for kind in ggufs:
        from benchmarks.peers.gguf_export import write_gguf

        file = work / f"{checkpoint.name}-{kind}.gguf"
        if not file.exists():
            write_gguf(checkpoint, file, kind)
        yield Form(f"GGUF {kind}", file)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    args.work.mkdir(parents=True, exist_ok=True)
    source = args.checkpoint or prepare()
    checkpoint = source
    if args.widen and not is_wide(source):
        checkpoint = args.work / f"{source.name}-wide"
        if not checkpoint.exists():
            widen(source, checkpoint)
    prose = text.read(args.text or [text.ROOT / name for name in text.DOCUMENTS])
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = text.windows(tokenizer, prose, args.windows, args.context)
    task = measure.Task(
        windows, text.prompts(tokenizer, args.answers), args.new_tokens, args.fast_windows, args.max_memory
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": source.name,
        "is_widened": checkpoint != source,
        "text": {
            "files": [file.name for file in args.text] if args.text else list(text.DOCUMENTS),
            "sha256": text.digest(prose),
            "windows": args.windows,
            "fast_windows": args.fast_windows,
            "context": args.context,
        },
        "answers": len(task.prompts),
        "new_tokens": args.new_tokens,
        "machine": describe_machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "forms": list(_measured(forms(checkpoint, args.codecs, args.gguf, args.work), task)),
    }


def _measured(every: Iterator[Form], task: measure.Task) -> Iterator[dict[str, Any]]:
    reference = None
    for form in every:
        reading = measure.read(form, task)
        reference = reference or reading
        found = measure.compare(reading, reference, task.windows)
        say(f"{form.name}, kernels {form.kernels}: KL {report.with_error(found['divergence'])[0]:.3g}")
        yield {"name": form.name, "kernels": form.kernels, "layer_bytes": measure.layer_bytes(form.path), **found}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="the folder for what is written anew")
    add("--checkpoint", type=Path, help="a folder with a bf16 checkpoint; the demo's by default")
    add("--codecs", type=lambda names: known_names(names, CODEC_NAMES), default=list(CODEC_NAMES))
    add("--gguf", type=lambda names: names.split(",") if names else [], default=[], help="types of blocks: Q8_0,Q4_0")
    add("--no-widen", dest="widen", action="store_false", help="take the checkpoint as it is")
    add("--text", type=Path, nargs="+", help="files to read instead of the project's documents")
    add("--windows", type=int, default=12)
    add("--fast-windows", type=int, default=3, help="those that are read with fast kernels, too")
    add("--context", type=int, default=256, help="tokens of a window")
    add("--answers", type=int, default=len(text.QUESTIONS))
    add("--new-tokens", type=int, default=16, help="of an answer")
    add("--max-memory", help="for the model; most of what is free by default")
    add("--out", type=Path, help="write this with .json, .md and .png behind it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say it."""
    args = parse(argv)
    if args.out:
        charts.check_matplotlib()
    results = run(args)
    table = report.table(results)
    print(f"{table}\n\n{report.caption(results)}\n")
    print(json.dumps(results))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(
            f"# What codecs cost in quality\n\n{table}\n\n{report.caption(results)}\n"
        )
        plot.draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
