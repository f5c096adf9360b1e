"""What the measured forms add up to: means with their errors, and a Markdown table. Pure; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from airstream.reporting.units import counted

REFERENCE = "bf16"
COLUMNS = (
    "form",
    "bytes of layers, of bf16's",
    "perplexity",
    "KL divergence, nats",
    "same likeliest token",
    "equal tokens of an answer",
    "KL, kernels fast",
    "same, kernels fast",
)

Measured = Mapping[str, Any]


def with_error(numbers: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; that is 0 of a single number."""
    return mean(numbers), stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


def summarise(forms: Sequence[Measured]) -> list[dict[str, Any]]:
    """Of each form: its name, kernels, `share` of bytes, and the means of what was measured, each with its error.

    `rise` is by how much perplexity is above that of the reference, as a share of it: by window, on the same tokens.
    """
    reference = next(form for form in forms if form["name"] == REFERENCE and form["kernels"] == "exact")
    rows = []
    for form in forms:
        pairs = zip(form["cross_entropy"], reference["cross_entropy"], strict=False)
        difference, error = with_error([own - its for own, its in pairs])
        rows.append(
            {
                "name": form["name"],
                "kernels": form["kernels"],
                "share": form["layer_bytes"] / reference["layer_bytes"],
                "perplexity": math.exp(mean(form["cross_entropy"])),
                "rise": (math.expm1(difference), math.exp(difference) * error),
                **{key: with_error(form[key]) for key in ("divergence", "agreement", "equal_tokens") if form[key]},
            }
        )
    return rows


def table(results: Measured) -> str:
    """A row for every form."""
    rows = summarise(results["forms"])
    fast = {row["name"]: row for row in rows if row["kernels"] == "fast"}
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(_cells(row, fast.get(row['name'])))} |" for row in rows if row["kernels"] == "exact"]
    return "\n".join(lines)


def _cells(row: Measured, fast: Measured | None) -> list[str]:
    is_reference = row["name"] == REFERENCE
    rise = "" if is_reference else f" ({100 * row['rise'][0]:+.1f} ± {100 * row['rise'][1]:.1f} %)"
    return [
        row["name"],
        f"{row['share']:.2f}",
        f"{row['perplexity']:.2f}{rise}",
        "" if is_reference else _divergence(row),
        "" if is_reference else f"{row['agreement'][0]:.1%}",
        "" if is_reference else f"{row['equal_tokens'][0]:.1f}",
        _divergence(fast) if fast else "",
        f"{fast['agreement'][0]:.1%}" if fast else "",
    ]


def _divergence(row: Measured) -> str:
    middle, error = row["divergence"]
    return f"{middle:.2g} ± {error:.1g}" if middle else "0"


def caption(results: Measured) -> str:
    """What was measured, and where, in a line."""
    text, machine = results["text"], results["machine"]
    tokens, few = text["windows"] * text["context"], counted(text["fast_windows"], "window")
    answers = f"{counted(results['answers'], 'answer')} of {counted(results['new_tokens'], 'token')}"
    return (
        f"{results['model']}, {tokens:,} tokens of English in windows of {text['context']} (with fast kernels the "
        f"first {few}, eight tokens at a time); {answers}; errors are standard errors of means over windows. "
        f"{machine['cpu']}, torch {results['versions']['torch']}, bfloat16."
    )
